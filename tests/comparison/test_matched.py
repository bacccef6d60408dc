import math

import pytest

from blora_pyro.comparison.candidates import read_candidate
from blora_pyro.comparison.matched import lowest, match
from blora_pyro.comparison.measures import Scores

BASE, BLORA = map(read_candidate, ("base", "blora:0.0001"))
COLD, HOT = map(read_candidate, ("lora:0.001", "lora:0.003"))
PLACE = ("de-en", 0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (0.1, math.nan),  # left of all
        (0.2, 0.4),
        (0.3, 0.3),  # half way from the first to the second
        (0.4, 0.2),
        (0.5, 0.15),  # from the second to the last: the third lies above
        (0.9, 0.1),  # what does better on x is better than x asks for
    ],
)
def test_the_curve_is_the_lower_hull(x, y):
    points = [(0.6, 0.1), (0.2, 0.4), (0.5, 0.4), (0.4, 0.2)]
    assert lowest(points, x) == pytest.approx(y, nan_ok=True)


@pytest.fixture
def scores(make_row):
    """On the straight line from the base to the hot LoRA, and below it."""
    errors = [(BASE, 0.6, 0.1), (COLD, 0.4, 0.2), (HOT, 0.2, 0.5), (BLORA, 0.3, 0.2)]
    return Scores([(one, PLACE, make_row(*both)) for one, *both in errors], draws=200)


def test_what_is_saved_at_equal_error(scores):
    found = match(scores, BLORA, [HOT, COLD], BASE)
    assert (found.candidate, found.method) == (BLORA, "lora")
    assert found.backward.value == pytest.approx(0.35 - 0.2)
    assert found.new_domain.value == pytest.approx(0.4 - 0.3)
    low, high = found.backward.interval
    assert 0 < low < found.backward.value < high


def test_a_method_against_itself_saves_nothing(scores):
    found = match(scores, COLD, [COLD, HOT], BASE)
    assert found.backward.value == found.new_domain.value == 0
    assert found.backward.interval == (0, 0)


def test_there_is_no_figure_where_the_curve_does_not_get(make_row):
    rows = [(BASE, PLACE, make_row(0.6, 0.1)), (HOT, PLACE, make_row(0.2, 0.5))]
    found = match(Scores([*rows, (BLORA, PLACE, make_row(0.1, 0.3))], 50), BLORA, [HOT], BASE)
    assert found.backward.value is None and found.backward.interval is None
    assert found.new_domain.value == pytest.approx(0.4 - 0.1)


def test_points_that_lack_a_domain_are_left_out(make_row):
    rows = [(BASE, (domain, 0), make_row(0.6, 0.1)) for domain in ("de-en", "es-en")]
    rows += [(HOT, (domain, 0), make_row(0.2, 0.5)) for domain in ("de-en", "es-en")]
    rows += [(BLORA, (domain, 0), make_row(0.4, 0.2)) for domain in ("de-en", "es-en")]
    rows.append((COLD, ("de-en", 0), make_row(0.4, 0.1)))
    found = match(Scores(rows, 50), BLORA, [HOT, COLD], BASE)
    assert found.backward.value == pytest.approx(0.3 - 0.2)


def test_without_a_place_in_common_there_is_nothing(make_row):
    rows = [(BLORA, ("es-en", 0), make_row(0.3, 0.2)), (HOT, PLACE, make_row(0.2, 0.5))]
    assert match(Scores(rows, 5), BLORA, [HOT], BASE) is None
    assert match(Scores(rows, 5), BLORA, [], BASE) is None
