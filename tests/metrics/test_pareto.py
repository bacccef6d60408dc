import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.metrics.pareto import dominates, knee, pareto_front

errors = st.integers(0, 20).map(lambda number: number / 20)
points = st.lists(st.tuples(errors, errors), min_size=1, max_size=12)


def test_a_point_dominates_by_one_error_alone():
    assert dominates((0.1, 0.2), (0.1, 0.3))
    assert not dominates((0.1, 0.2), (0.1, 0.2))
    assert not dominates((0.1, 0.4), (0.2, 0.3))


def test_the_front_is_in_order_and_has_equal_points():
    assert pareto_front([(3, 1), (1, 3), (2, 2), (2.5, 2.5), (2, 2), (3, 3)]) == [1, 2, 4, 0]
    assert pareto_front([]) == []


@settings(max_examples=50)
@given(points)
def test_the_front_is_what_none_dominates(found):
    front = pareto_front(found)
    assert {found[i] for i in front} == {
        one for one in found if not any(dominates(other, one) for other in found)
    }
    assert len(set(front)) == len(front)


# from (0.10, 0.10), much is saved in the second error up to (0.14, 0.06), and little after that
FRONT = [(0.10, 0.10), (0.12, 0.08), (0.14, 0.06), (0.30, 0.055), (0.50, 0.05)]


def test_the_knee_is_where_giving_way_no_longer_pays():
    assert knee(FRONT) == 2
    assert knee([*FRONT, (0.2, 0.2), (0.5, 0.09)]) == 2  # what is dominated has no say
    assert knee([(1000 * x, y) for x, y in FRONT]) == 2  # nor has the unit


def test_a_base_that_dominates_every_point_sets_no_scale():
    assert knee(FRONT, base=(0.0, 0.0)) == knee(FRONT)
    straight = [(0.0, 0.1), (0.05, 0.05), (0.1, 0.0)]
    assert knee(straight, base=(0.0, 0.0)) == knee(straight)


def test_the_base_sets_the_scale_and_is_no_knee():
    near = [(0.10, 0.10), (0.11, 0.08), (0.15, 0.06)]
    assert knee(near) == 1  # x 0.2, y 0.5
    assert knee(near, base=(0.50, 0.05)) == 2  # on its scale 0.15 is nearly as good as 0.10
    assert knee(FRONT[:4], base=FRONT[4]) == 2
    assert knee(FRONT, base=(0.60, 0.2)) == 2  # dominated: no end


def test_a_point_worse_than_the_base_is_the_knee_only_if_all_are():
    better = [(0.30, 0.10), (0.35, 0.06), (0.45, 0.055)]
    assert knee([(0.6, 0.051), *better], base=(0.5, 0.05)) == 2
    assert knee([(0.6, 0.08), (0.7, 0.06)], base=(0.5, 0.05)) == 0


def test_without_a_bend_it_is_the_lowest_mean():
    assert knee([(0.1, 0.3), (0.25, 0.25)]) == 0
    assert knee([(0.1, 0.4), (0.3, 0.3), (0.4, 0.05)]) == 2  # bends away from the origin
    assert knee([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)]) in (0, 1, 2)
    assert knee([(0.2, 0.2)]) == 0
    assert knee([]) is None


@settings(max_examples=50)
@given(points, st.tuples(errors, errors))
def test_the_knee_is_on_the_front(found, base):
    assert knee(found, base) in pareto_front(found)
    assert knee(found) in pareto_front(found)


@settings(max_examples=50)
@given(points)
def test_the_knee_is_the_same_point_if_the_two_errors_change_places(found):
    swapped = [(second, first) for first, second in found]
    one, other = knee(found), knee(swapped)
    heights = {sum(found[one]), sum(found[other])}
    if len(pareto_front(found)) < 3:  # else a tie may be broken the other way
        assert len(heights) == 1 or max(heights) == pytest.approx(min(heights))
