import json
from dataclasses import replace

import pytest

from blora_pyro.fitting.history import Step
from blora_pyro.models import Pooling
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.record import RunRecord
from blora_pyro.runs.report_figures import (
    NEW,
    OLD,
    POINTS,
    forests,
    headline,
    layers,
    loss_plots,
    rows_of,
    strength_figure,
    with_minus,
)

from .test_report import METRICS, backward, change, rate


def sentence(metrics):
    return "".join(one.text for one in headline(metrics))


def kinds(metrics):
    return [one.kind for one in headline(metrics) if one.kind]


# ---- gained and lost


def test_the_headline_tells_what_was_gained_and_lost():
    assert sentence(METRICS) == (
        "New domain 65.4 → 27.1% WER; old languages +1.2 points, which may be chance"
    )
    assert kinds(METRICS) == ["gain", "even"]
    average = {**METRICS["backward_error"], "change": change(0.02, 0.001, 0.04)}
    worse = {**METRICS, "backward_error": average}
    assert sentence(worse).endswith("; old languages +2.0 points")
    assert kinds(worse) == ["gain", "harm"]
    named = {**METRICS, "backward": {"calls": METRICS["backward"]["de"]}}
    assert "; backward sets +1.2 points" in sentence(named)
    better = {**METRICS, "backward_error": {**average, "change": change(-0.02, -0.04, -0.001)}}
    assert sentence(better).endswith("; old languages −2.0 points") and kinds(better)[1] == "gain"


def test_the_headline_of_domains_of_a_set_and_of_nothing():
    both = METRICS["new_domain"]
    domains = {"backward": {}, "domains": {"calls": both, "radio": both}}
    assert sentence(domains) == "Domain calls 65.4 → 27.1% WER; domain radio 65.4 → 27.1% WER"
    assert sentence({"backward": {}, "data": both}) == "Data 65.4 → 27.1% WER"
    assert sentence({"backward": {}}) == sentence({}) == "Nothing was measured"
    lost = {name: METRICS[name] for name in ("backward", "backward_error")}
    assert sentence(lost).startswith("Old languages +1.2")
    unknown = {**both, "adapted": {**both["adapted"], "wer": rate(None, None, None)}}
    unknown["change"] = {"wer": change(None, None, None)}
    assert sentence({"backward": {}, "new_domain": unknown}) == "New domain 65.4 → –% WER"


def test_every_set_has_a_row_and_the_new_domain_one_for_each_measure():
    rows = rows_of("", METRICS)
    assert [(row.group, row.name, row.measure) for row in rows] == [
        (NEW, "new domain", "WER"),
        (NEW, "new domain", "CER"),
        (NEW, "new domain", "PIER"),
        (OLD, "de", "WER"),
        (OLD, "fr", "WER"),
        (OLD, "average", ""),
    ]
    assert [row.kind for row in rows] == ["gain"] * 3 + ["even"] * 3
    assert rows[0].base == 0.6543 and rows[0].change == -0.3838 and rows[0].low == -0.45
    drifted = backward(rate(0.0, 0, 0), rate(0.1, 0, 0.2))
    drifted["drift"] = True
    looping = backward(rate(0.0, 0, 0), rate(0.1, 0, 0.2))
    looping["adapted"]["loops"] = 2
    rows = rows_of("", {"backward": {"de": drifted, "fr": looping}})
    assert [row.note for row in rows] == ["drift", "2 loops"]


def test_an_axis_holds_its_intervals_and_zero():
    new, old = forests({"": METRICS})
    for group, ends in ((new, (-0.8, -0.15)), (old, (-0.004, 0.0289))):
        low, *_, high = group["axis"].ticks
        assert low <= 100 * min(0, ends[0]) and high >= 100 * max(0, ends[1])
    assert [group["title"] for group in forests({"": {"backward": METRICS["backward"]}})] == [OLD]
    assert forests({"": {}}) == []


def test_rows_of_several_runs_stand_together_by_set():
    fewer = {**METRICS, "backward": {"fr": METRICS["backward"]["fr"]}}
    new, old = forests({"A": METRICS, "B": fewer})
    assert [(row.label, row.name) for row in new["rows"]] == [
        ("A", "new domain"),
        ("B", "new domain"),
    ]
    assert [f"{row.label} {row.name}" for row in old["rows"]] == [
        *("A de", "A fr", "B fr", "A average", "B average")
    ]


def test_hyphens_before_numbers_become_minus_signs_and_others_stay():
    assert (
        with_minus("-0.3 [-1.7, 1.0], 1e-05, de-en, test-2")
        == "−0.3 [−1.7, 1.0], 1e-05, de-en, test-2"
    )


# ---- curves


def record_of(steps, beta=1e-4, **more):
    history = [Step(n, 0.0, 4.0 / n, 100.0 * n, 1e-3, 20) for n in range(1, steps + 1)]
    return RunRecord(config=FitConfig(beta=beta), history=history, **more)


def places(path):
    return [tuple(map(float, part.split())) for part in path.removeprefix("M").split(" L")]


def test_the_loss_falls_from_left_to_right():
    nll, kl = loss_plots(record_of(50))
    assert nll.title.startswith("NLL: 4 → ") and kl.title.startswith("0.0001 · KL: 0.01 → ")
    for name, path in nll.paths:
        points = places(path)
        assert len(points) == 50, name
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in points)
        assert points[0][0] < points[-1][0] and points[0][1] < points[-1][1]  # y is downwards
    assert places(kl.paths[0][1])[0][1] > places(kl.paths[0][1])[-1][1]


def test_a_long_fit_has_no_more_points_and_one_without_kl_or_steps_fewer_plots():
    nll, _ = loss_plots(record_of(5_000))
    assert len(places(nll.paths[0][1])) == POINTS
    assert len(list(loss_plots(record_of(20, beta=0)))) == 1
    assert list(loss_plots(record_of(1))) == list(loss_plots(RunRecord(config=FitConfig()))) == []


def test_dev_errors_have_a_plot_with_the_best_step_marked():
    errors = [{"step": 10 * n, "error": 0.5 / n} for n in (1, 2, 3)]
    dev = {"errors": errors, "best_step": 20, "ended_by": "steps"}
    *_, plot = loss_plots(record_of(30, dev=dev))
    assert plot.title == "Error on the dev set: 25.0% at step 20, the best"
    assert [mark["kind"] for mark in plot.marks] == ["even", "chosen", "even"]


def test_a_curve_of_strengths_marks_the_one_that_was_chosen(kept_run):
    run, _ = kept_run
    kept = json.loads((run.output / "run.json").read_text())["kept"]
    plot = strength_figure(kept)
    chosen = [mark["text"] for mark in plot.marks if mark["kind"] == "chosen"]
    assert chosen == [f"{kept['strength']:g}"]
    assert (plot.marks[0]["text"], plot.marks[-1]["text"]) == ("base", "fit")
    assert all(mark["low"] <= mark["y"] <= mark["high"] for mark in plot.marks)
    points = kept["curve"]["points"]
    unknown = {**points[1], "new_domain": {"rate": None, "interval": [None, None]}}
    curve = {**kept["curve"], "points": [points[0], unknown, *points[2:]]}
    assert len(strength_figure({**kept, "curve": curve}).marks) == len(plot.marks) - 1


# ---- layers


@pytest.mark.parametrize("name", ["normal", "horseshoe", "pooled", "pruned", "combined", "second"])
def test_every_kind_of_posterior_has_its_layers(name, old_runs):
    posterior, record = read_run(old_runs / name, pooled=True)
    found = layers(posterior, 1e-4, record.made_of is None)
    assert found is not None
    grid = found["grid"]
    assert grid["blocks"] and grid["columns"] and grid["cells"]
    assert max(cell["share"] for cell in grid["cells"].values()) == 1
    has_prior = name not in ("pooled", "pruned", "combined")
    assert bool(found["words"]) is has_prior
    about = next(iter(grid["cells"].values()))["about"]
    assert "directions above their spread" in about and ("nats a weight" in about) is has_prior


def test_a_fit_that_is_turned_down_to_the_base_has_updates_of_zero(random_posterior):
    found = layers(at_strength(random_posterior(0), 0.0), 1e-4)
    assert {cell["text"] for cell in found["grid"]["cells"].values()} == {"0"}


def test_domains_that_share_nothing_have_no_layers_in_common(old_runs):
    posterior = Posterior.load(old_runs / "pooled")
    apart = replace(posterior, pooling=Pooling("none", ("a", "b")))
    assert layers(apart, 1e-4) is None


def test_a_prior_that_is_code_is_not_run_for_a_report(random_posterior):
    found = layers(replace(random_posterior(0), family=Family("mine.py", {}, "mine.py")), 1e-4)
    assert found["kinds"] is None and found["words"] == "" and found["grid"]["cells"]
