import math

import numpy as np
import pytest

from blora_pyro.metrics.bootstrap import paired_macro_bootstrap
from blora_pyro.studies.estimates import Scores, lowest, match
from blora_pyro.studies.methods import read_candidate

from .conftest import made_up

BASE, LORA, BLORA = map(read_candidate, ("base", "lora:0.003", "blora:0.0001"))
COLD, HOT = map(read_candidate, ("lora:0.001", "lora:0.003"))
REPEAT = ("de-en", 0)


def make_row(new_domain, backward, **about):
    """A score of errors as given."""
    names = ("pocket", "all", "lora", "lora:0.003", "de-en", 0, "test")
    return made_up(names, new_domain, backward, **about)


@pytest.fixture
def scores():
    """Two domains and two seeds. Backward errors: base 0.1, LoRA 0.3 and 0.5, BLoRA 0.2."""
    rows = []
    for domain in ("de-en", "es-en"):
        rows.append((BASE, (domain, 0), make_row(0.6, 0.1)))
        for seed, back in enumerate((0.3, 0.5)):
            new = 0.2 if domain == "de-en" else 0.3
            rows.append((LORA, (domain, seed), make_row(new, back, seed=seed)))
            rows.append((BLORA, (domain, seed), make_row(new + 0.05, 0.2, seed=9 + seed)))
    return Scores(rows, draws=200)


def test_errors_are_averaged_over_seeds_then_over_domains(scores):
    result = scores.result(LORA, BASE)
    assert result.new_domain.value == pytest.approx((0.2 + 0.3) / 2)
    assert result.data == pytest.approx({"de-en": 0.2, "es-en": 0.3})
    assert result.pier.value == pytest.approx(0.25)
    assert result.backward.value == pytest.approx(0.4)
    assert result.sets == pytest.approx({"de": 0.4, "en": 0.4})
    assert result.forgetting.value == pytest.approx(0.4 - 0.1)


def test_a_domain_with_fewer_seeds_counts_as_much_as_another():
    places = {("de-en", 0): 0.1, ("de-en", 1): 0.3, ("es-en", 0): 0.6}
    rows = [(LORA, place, make_row(new, 0.1)) for place, new in places.items()]
    result = Scores(rows, draws=5).result(LORA, BASE)
    assert result.new_domain.value == pytest.approx((0.2 + 0.6) / 2)
    assert result.new_domain.stddev is None  # seed 1 has not all domains
    assert result.forgetting is None  # of a base without a row


def test_the_deviation_is_that_over_seeds(scores):
    result = scores.result(LORA, BASE)
    assert result.backward.stddev == pytest.approx(np.std([0.3, 0.5], ddof=1))
    assert result.forgetting.stddev == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert result.new_domain.stddev == pytest.approx(0)
    assert scores.result(BASE, BASE).backward.stddev is None  # it has no seed
    assert scores.result(BASE, BASE).forgetting is None


def test_against_lora(scores):
    found = scores.against(BLORA, LORA, BASE)
    assert found.backward_gain.value == pytest.approx((0.4 - 0.2) / 0.4)
    assert found.new_domain_drop.value == pytest.approx((0.3 - 0.25) / 0.25)
    assert found.forgetting_removed.value == pytest.approx(1 - (0.2 - 0.1) / (0.4 - 0.1))
    gains = [(0.3 - 0.2) / 0.3, (0.5 - 0.2) / 0.5]
    assert found.backward_gain.stddev == pytest.approx(np.std(gains, ddof=1))
    for one in (found.backward_gain, found.new_domain_drop, found.forgetting_removed):
        low, high = one.interval
        assert low < one.value < high


def test_intervals_are_those_of_the_paired_bootstrap():
    lora, base = make_row(0.3, {"de": 0.4}, seed=3), make_row(0.6, {"de": 0.1}, seed=8)
    rows = [(LORA, ("de-en", 0), lora), (BASE, ("de-en", 0), base)]
    found = Scores(rows, draws=4000).result(LORA, BASE).forgetting
    expected = paired_macro_bootstrap([base.main("de")], [lora.main("de")], draws=4000)
    assert (found.value, *found.interval) == pytest.approx(expected, abs=0.02)


def test_the_same_rows_differ_by_nothing_in_every_resampling(scores):
    row, base = make_row(0.2, 0.3), make_row(0.6, 0.1)
    place = ("de-en", 0)
    rows = [(LORA, place, row), (BLORA, place, row), (BASE, place, base)]
    found = Scores(rows, draws=50).against(BLORA, LORA, BASE)
    assert found.backward_gain.interval == (0, 0)
    assert found.new_domain_drop.interval == (0, 0)


def test_sets_are_resampled_apart():
    # If all sets were resampled alike, opposite errors would cancel in every resampling.
    row = make_row(0.2, {"de": 0.3, "en": 0.3})
    edits = row.main("de").edits
    row.main("en").edits[:] = edits.max() - edits
    scores = Scores([(LORA, ("de-en", 0), row)], draws=100)
    low, high = scores.result(LORA, BASE).backward.interval
    assert high - low > 0.02


def test_only_common_domains_and_seeds_are_compared():
    rows = [
        (LORA, ("de-en", 0), make_row(0.2, 0.4)),
        (LORA, ("de-en", 1), make_row(0.9, 0.9)),
        (BLORA, ("de-en", 0), make_row(0.3, 0.2)),
        (BASE, ("de-en", 0), make_row(0.6, 0.1)),
    ]
    scores = Scores(rows, draws=5)
    assert scores.against(BLORA, LORA, BASE).backward_gain.value == pytest.approx(0.5)
    assert scores.against(BLORA, read_candidate("lora:0.1"), BASE) is None


def test_nothing_is_removed_where_lora_forgets_nothing():
    place = ("de-en", 0)
    rows = [(one, place, make_row(0.2, 0.1)) for one in (LORA, BLORA, BASE)]
    found = Scores(rows, draws=20).against(BLORA, LORA, BASE).forgetting_removed
    assert (found.value, found.interval) == (None, None)


def test_a_quotient_that_is_often_undefined_has_no_interval():
    place = ("de-en", 0)
    rows = [
        (LORA, place, make_row(0.2, 0.11, seed=1)),  # hardly above the base
        (BLORA, place, make_row(0.2, 0.1, seed=2)),
        (BASE, place, make_row(0.2, 0.1, seed=3)),
    ]
    found = Scores(rows, draws=200).against(BLORA, LORA, BASE).forgetting_removed
    assert found.value is not None and found.interval is None


def test_failed_rows_are_named_and_in_no_figure():
    rows = [
        (LORA, ("de-en", 0), make_row(0.2, 0.3)),
        (LORA, ("de-en", 1), make_row(0.0, 0.0, failed="nan")),
    ]
    result = Scores(rows, draws=5).result(LORA, BASE)
    assert (result.repeats, result.failed) == ((("de-en", 0),), (("de-en", 1),))
    assert result.new_domain.value == pytest.approx(0.2)
    assert Scores(rows[1:], draws=5).result(LORA, BASE) is None


def test_size_time_and_sparsity():
    sparse = [{"A": share, "B": None, "delta_w": 0.5} for share in (0.2, 0.4)]
    rows = [
        (LORA, ("de-en", seed), make_row(0.2, 0.3, sparsity=one, seconds=10 + seed))
        for seed, one in enumerate(sparse)
    ]
    result = Scores(rows, draws=5).result(LORA, BASE)
    assert result.sparsity == pytest.approx({"A": 0.3, "B": None, "delta_w": 0.5})
    assert (result.weights, result.bytes, result.seconds) == (1000, 4096, 10.5)


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
    return Scores([(one, REPEAT, make_row(*both)) for one, *both in errors], draws=200)


def test_what_is_saved_at_equal_error(line):
    found = match(line, BLORA, [HOT, COLD], BASE)
    assert (found.candidate, found.method) == (BLORA, "lora")
    assert found.backward.value == pytest.approx(0.35 - 0.2)
    assert found.new_domain.value == pytest.approx(0.4 - 0.3)
    low, high = found.backward.interval
    assert 0 < low < found.backward.value < high


def test_a_method_against_itself_saves_nothing(line):
    found = match(line, COLD, [COLD, HOT], BASE)
    assert found.backward.value == found.new_domain.value == 0
    assert found.backward.interval == (0, 0)


def test_there_is_no_figure_where_the_curve_does_not_get():
    rows = [(BASE, REPEAT, make_row(0.6, 0.1)), (HOT, REPEAT, make_row(0.2, 0.5))]
    found = match(Scores([*rows, (BLORA, REPEAT, make_row(0.1, 0.3))], 50), BLORA, [HOT], BASE)
    assert found.backward.value is None and found.backward.interval is None
    assert found.new_domain.value == pytest.approx(0.4 - 0.1)


def test_points_that_lack_a_data_set_are_left_out():
    rows = [(BASE, (domain, 0), make_row(0.6, 0.1)) for domain in ("de-en", "es-en")]
    rows += [(HOT, (domain, 0), make_row(0.2, 0.5)) for domain in ("de-en", "es-en")]
    rows += [(BLORA, (domain, 0), make_row(0.4, 0.2)) for domain in ("de-en", "es-en")]
    rows.append((COLD, ("de-en", 0), make_row(0.4, 0.1)))
    found = match(Scores(rows, 50), BLORA, [HOT, COLD], BASE)
    assert found.backward.value == pytest.approx(0.3 - 0.2)


def test_without_a_repeat_in_common_there_is_nothing():
    rows = [(BLORA, ("es-en", 0), make_row(0.3, 0.2)), (HOT, REPEAT, make_row(0.2, 0.5))]
    assert match(Scores(rows, 5), BLORA, [HOT], BASE) is None
    assert match(Scores(rows, 5), BLORA, [], BASE) is None
