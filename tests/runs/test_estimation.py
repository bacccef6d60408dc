import pytest

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.runs.estimation import (
    Times,
    clock,
    estimate_fit,
    estimate_tables,
    scoring_work,
)
from blora_pyro.runs.scoring import SetSource
from blora_pyro.tables import report_text


@pytest.fixture
def estimate(fit_options, tmp_path, monkeypatch):
    """Returns the estimate of a fit with these options, made in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda **options: estimate_fit(FitConfig(**{**fit_options, **options}))


def test_figures_are_positive_and_the_parts_make_the_sum(estimate, tones_folder, tmp_path):
    dev = {"dev": str(tones_folder / "test.jsonl"), "eval_every": 15}
    found = estimate(target_modules=".*decoder.*", cache_encoder=True, **dev)
    assert not [*tmp_path.iterdir()]
    counts = {one["name"]: one["count"] for one in found["work"]}
    assert counts == {
        "encoding, once": 2,
        "steps": 40,
        "dev error on the way": 3 * 2,
        "test sets, base": 6,
        "test sets, adapted": 6,
    }
    for one in found["work"]:
        assert one["seconds_each"] > 0
        assert one["seconds"] == pytest.approx(one["count"] * one["seconds_each"])
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["work"]))
    assert found["memory"] is None or found["memory"] > 1e7
    assert found["disk"] == (2 + 6) * 50 * 16 * 4  # states of (50, 16) in float32
    text = report_text(estimate_tables(found))
    assert clock(found["seconds"]) in text and "fallbacks to higher temperatures" in text


def test_epochs_are_of_all_training_data_though_few_are_loaded(estimate):
    found = estimate(batch_size=1, steps=1, epochs=3.0, backward=())
    counts = {one["name"]: one["count"] for one in found["work"]}
    assert counts == {"steps": 6, "test sets, base": 2, "test sets, adapted": 2}
    assert found["disk"] == 0


def test_an_adapted_encoder_hears_every_set_again():
    one, other = SetSource("a", "test"), SetSource("b", "test")
    sets = {"new_domain": one, "x (a)": other, "x (b)": other}
    times, counts = Times(encode=2.0, decode=1.0), {one: 10, other: 5}
    base, adapted = scoring_work("dev", sets, counts, times, shares=False, strengths=6)
    assert (base.count, base.seconds) == (15, 45.0)
    assert (adapted.count, adapted.seconds) == (120, 360.0)
    assert scoring_work("dev", sets, counts, times, shares=True)[1].seconds == 20.0
    assert not scoring_work("test", {}, counts, times, shares=True)


def test_what_a_fit_refuses_is_refused(estimate):
    with pytest.raises(UserError, match="keep needs the dev and the test split"):
        estimate(keep=1)


def test_hours_are_not_days():
    assert clock(25 * 3600 + 61.4) == "25:01:01"
