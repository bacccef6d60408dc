import math
from operator import sub

import numpy as np
import pytest

from blora_pyro.metrics.bootstrap import paired_macro_bootstrap
from blora_pyro.studies.estimates import Resampled, lowest
from blora_pyro.studies.methods import read_candidate

from .conftest import made_up

BASE, LORA, BLORA = map(read_candidate, ("base", "lora:0.003", "blora:0.0001"))
COLD, MILD, HOT = map(read_candidate, ("lora:0.001", "lora:0.002", "lora:0.003"))
REPEAT = ("de-en", 0)


def made(candidate, repeat, new_domain, backward, **about):
    """A score of errors as given."""
    names = ("pocket", "all", candidate.method.name, candidate.text, *repeat, "test")
    return made_up(names, new_domain, backward, **about)


def error(scores, candidate, figure):
    """Its error on all that it is scored with."""
    return scores.estimate([(candidate, figure)], scores.repeats(candidate))


@pytest.fixture
def scores():
    """Two domains and two seeds. Backward errors: base 0.1, LoRA 0.3 and 0.5, BLoRA 0.2."""
    rows = []
    for domain in ("de-en", "es-en"):
        rows.append(made(BASE, (domain, 0), 0.6, 0.1))
        for seed, back in enumerate((0.3, 0.5)):
            new = 0.2 if domain == "de-en" else 0.3
            rows.append(made(LORA, (domain, seed), new, back, seed=seed))
            rows.append(made(BLORA, (domain, seed), new + 0.05, 0.2, seed=9 + seed))
    return Resampled(rows, draws=200)


def test_errors_are_averaged_over_seeds_then_over_domains(scores):
    expected = {"new_domain": (0.2 + 0.3) / 2, "pier": 0.25, "backward": 0.4, "de": 0.4, "en": 0.4}
    for figure, value in expected.items():
        assert error(scores, LORA, figure).share == pytest.approx(value)
    assert error(scores, LORA, "fr") is None
    assert error(scores, COLD, "backward") is None


def test_a_domain_with_fewer_seeds_counts_as_much_as_another():
    places = {("de-en", 0): 0.1, ("de-en", 1): 0.3, ("es-en", 0): 0.6}
    rows = [made(LORA, place, new, 0.1) for place, new in places.items()]
    found = error(Resampled(rows, draws=5), LORA, "new_domain")
    assert found.share == pytest.approx((0.2 + 0.6) / 2)
    assert found.stddev is None  # seed 1 has not all domains


def test_the_deviation_is_that_over_seeds(scores):
    assert error(scores, LORA, "backward").stddev == pytest.approx(np.std([0.3, 0.5], ddof=1))
    assert error(scores, LORA, "new_domain").stddev == pytest.approx(0)
    assert error(scores, BASE, "backward").stddev is None  # it has no seed


def test_intervals_are_over_seeds_as_well(scores):
    both = error(scores, LORA, "backward")  # 0.3 and 0.5 by seed
    one = [place for place in scores.repeats(LORA) if place[1] == 0]
    single = scores.estimate([(LORA, "backward")], one)
    width, of_one_seed = (high - low for low, high in (both.interval, single.interval))
    assert width > 0.2 > of_one_seed
    assert both.interval[0] < 0.31 and both.interval[1] > 0.49
    # all methods see the same seeds: what every seed gains alike has no spread over them
    gain = scores.estimate([(LORA, "backward"), (LORA, "backward")], scores.repeats(LORA), sub)
    assert gain.interval == (0.0, 0.0)


def test_gain_drop_and_forgetting_removed_are_quotients_of_averages(scores):
    found = scores.against(BLORA, LORA, BASE)
    expected = {
        "backward_gain": (0.4 - 0.2) / 0.4,
        "new_domain_drop": (0.3 - 0.25) / 0.25,
        "forgetting_removed": 1 - (0.2 - 0.1) / (0.4 - 0.1),
    }
    assert {name: one.share for name, one in found.items()} == pytest.approx(expected)
    gains = [(0.3 - 0.2) / 0.3, (0.5 - 0.2) / 0.5]
    assert found["backward_gain"].stddev == pytest.approx(np.std(gains, ddof=1))
    for one in found.values():
        low, high = one.interval
        assert low < one.share < high and one.signed


def test_intervals_are_those_of_the_paired_bootstrap():
    rows = [
        made(LORA, REPEAT, 0.3, {"de": 0.4}, seed=3),
        made(BASE, REPEAT, 0.6, {"de": 0.1}, seed=8),
    ]
    parts = [(LORA, "backward"), (BASE, "backward")]
    found = Resampled(rows, draws=4000).estimate(parts, [REPEAT], lambda one, base: one - base)
    expected = paired_macro_bootstrap([rows[1].main("de")], [rows[0].main("de")], draws=4000)
    assert (found.share, *found.interval) == pytest.approx(expected, abs=0.02)


def test_the_same_counts_differ_by_nothing_in_every_resampling():
    rows = [made(one, REPEAT, 0.2, 0.3) for one in (LORA, BLORA)]
    found = Resampled([*rows, made(BASE, REPEAT, 0.6, 0.1)], draws=50).against(BLORA, LORA, BASE)
    assert found["backward_gain"].interval == found["new_domain_drop"].interval == (0, 0)


def test_sets_are_resampled_apart():
    # If all sets were resampled alike, opposite errors would cancel in every resampling.
    row = made(LORA, REPEAT, 0.2, {"de": 0.3, "en": 0.3})
    edits = row.main("de").edits
    row.main("en").edits[:] = edits.max() - edits
    low, high = error(Resampled([row], draws=100), LORA, "backward").interval
    assert high - low > 0.02


def test_only_common_domains_and_seeds_are_compared():
    rows = [
        made(LORA, ("de-en", 0), 0.2, 0.4),
        made(LORA, ("de-en", 1), 0.9, 0.9),
        made(BLORA, ("de-en", 0), 0.3, 0.2),
        made(BASE, ("de-en", 0), 0.6, 0.1),
    ]
    scores = Resampled(rows, draws=5)
    assert scores.against(BLORA, LORA, BASE)["backward_gain"].share == pytest.approx(0.5)
    assert scores.against(BLORA, read_candidate("lora:0.1"), BASE) == {}


def test_nothing_is_removed_where_lora_forgets_nothing():
    rows = [made(one, REPEAT, 0.2, 0.1) for one in (LORA, BLORA, BASE)]
    found = Resampled(rows, draws=20).against(BLORA, LORA, BASE)["forgetting_removed"]
    assert (found.share, found.interval) == (None, None)


def test_a_quotient_that_is_often_undefined_has_no_interval():
    rows = [
        made(LORA, REPEAT, 0.2, 0.11, seed=1),  # hardly above the base
        made(BLORA, REPEAT, 0.2, 0.1, seed=2),
        made(BASE, REPEAT, 0.2, 0.1, seed=3),
    ]
    found = Resampled(rows, draws=200).against(BLORA, LORA, BASE)["forgetting_removed"]
    assert found.share is not None and found.interval is None


def test_failed_scores_are_in_no_figure():
    rows = [made(LORA, REPEAT, 0.2, 0.3), made(LORA, ("de-en", 1), 0.0, 0.0, failed="nan")]
    scores = Resampled(rows, draws=5)
    assert scores.repeats(LORA) == [REPEAT]
    assert error(scores, LORA, "new_domain").share == pytest.approx(0.2)


# ---- against a curve


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
def line():
    """On the straight line from the base to the hot LoRA, and below it."""
    errors = [(BASE, 0.6, 0.1), (COLD, 0.4, 0.2), (HOT, 0.2, 0.5), (BLORA, 0.3, 0.2)]
    return Resampled([made(one, REPEAT, *both) for one, *both in errors], draws=200)


def test_what_is_saved_at_equal_error(line):
    found = line.match(BLORA, [HOT, COLD], BASE)
    assert found["lower_backward"].share == pytest.approx(0.35 - 0.2)
    assert found["lower_new_domain"].share == pytest.approx(0.4 - 0.3)
    low, high = found["lower_backward"].interval
    assert 0 < low < found["lower_backward"].share < high


def test_a_method_against_itself_saves_nothing(line):
    found = line.match(COLD, [COLD, HOT], BASE)
    assert {one.share for one in found.values()} == {0}
    assert found["lower_backward"].interval == (0, 0)


def test_there_is_no_figure_where_the_curve_does_not_get():
    errors = [(BASE, 0.6, 0.1), (HOT, 0.2, 0.5), (MILD, 0.5, 0.4), (BLORA, 0.1, 0.3)]
    scores = Resampled([made(one, REPEAT, *both) for one, *both in errors], 50)
    found = scores.match(BLORA, [HOT, MILD], BASE)
    assert (found["lower_backward"].share, found["lower_backward"].interval) == (None, None)
    assert found["lower_new_domain"].share == pytest.approx(0.4 - 0.1)


def test_points_that_lack_a_data_set_are_left_out():
    errors = [(BASE, 0.6, 0.1), (HOT, 0.2, 0.5), (MILD, 0.5, 0.4), (BLORA, 0.4, 0.2)]
    rows = [made(one, (data, 0), *both) for data in ("de-en", "es-en") for one, *both in errors]
    rows.append(made(COLD, REPEAT, 0.4, 0.1))
    found = Resampled(rows, 50).match(BLORA, [HOT, MILD, COLD], BASE)
    assert found["lower_backward"].share == pytest.approx(0.3 - 0.2)


def test_two_points_are_no_curve():
    errors = [(BASE, 0.6, 0.1), (HOT, 0.2, 0.5), (BLORA, 0.4, 0.2)]
    scores = Resampled([made(one, REPEAT, *both) for one, *both in errors], 50)
    assert scores.match(BLORA, [HOT, COLD], BASE) == {}


def test_without_a_repeat_in_common_there_is_nothing():
    rows = [made(BLORA, ("es-en", 0), 0.3, 0.2), made(HOT, REPEAT, 0.2, 0.5)]
    assert Resampled(rows, 5).match(BLORA, [HOT], BASE) == {}
    assert Resampled(rows, 5).match(BLORA, [], BASE) == {}
