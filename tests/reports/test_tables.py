import copy
import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from blora_pyro.diagnostics import FactorSummary, Summary, UpdateSummary
from blora_pyro.diagnostics.explanations import Shrinkage
from blora_pyro.guides import FAMILIES, describe_prior
from blora_pyro.reports.tables import (
    dev_line,
    diagnosis_tables,
    fit_tables,
    print_tables,
    prior_tables,
    strength_tables,
)
from blora_pyro.runs.diagnosis import Diagnosis, Khat, KindSummary


def rate(value, low, high):
    return {"rate": value, "interval": [low, high]}


def change(value, low, high):
    return {"difference": value, "interval": [low, high]}


def backward(base, adapted):
    return {
        "base": {"metric": "wer", "utterances": 9, "wer": base, "cer": rate(0.111, 0.1, 0.12)},
        "adapted": {"metric": "wer", "utterances": 9, "wer": adapted, "cer": rate(0.2, 0.1, 0.3)},
        "change": {"wer": change(0.0123, -0.004, 0.0289), "cer": change(0, 0, 0)},
    }


METRICS = {
    "new_domain": {
        "name": "de-en",
        "base": {
            "metric": "wer",
            "utterances": 40,
            "wer": rate(0.6543, 0.6012, 0.7089),
            "cer": rate(0.301, 0.25, 0.35),
            "pier": rate(1.0567, 0.9, 1.2),
        },
        "adapted": {
            "metric": "wer",
            "utterances": 40,
            "wer": rate(0.2708, 0.22, 0.33),
            "cer": rate(0.1, 0.05, 0.15),
            "pier": rate(0.4, 0.3, 0.5),
        },
        "change": {
            "wer": change(-0.3838, -0.45, -0.3211),
            "cer": change(-0.201, -0.25, -0.15),
            "pier": change(-0.6567, -0.8, -0.5),
        },
    },
    "backward": {
        "de": backward(rate(0.0612, 0.04, 0.08), rate(0.0735, 0.05, 0.1)),
        "fr": backward(rate(0.15, 0.1, 0.2), rate(0.1623, 0.11, 0.21)),
    },
    "backward_error": {
        "base": rate(0.1056, 0.08, 0.13),
        "adapted": rate(0.1179, 0.09, 0.14),
        "change": change(0.0123, -0.001, 0.025),
    },
    "sparsity": {"A": 0.1234, "B": 0.5, "delta_w": 0.9971},
}


def rendered(metrics, width=110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for line in fit_tables(metrics):
        console.print(line, soft_wrap=isinstance(line, str))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(lines, *starts) -> str:
    """The one line with all these words, spaces squeezed and rules dropped."""
    (line,) = [line for line in lines if all(start in line for start in starts)]
    return " ".join(line.replace("│", " ").split())


def test_the_new_domain_has_a_row_a_measure_in_percent_with_intervals():
    lines = rendered(METRICS)
    assert row(lines, "new domain de-en") == (
        "new domain de-en WER 65.4 [60.1, 70.9] 27.1 [22.0, 33.0] -38.4 [-45.0, -32.1]"
    )
    assert row(lines, "CER") == "CER 30.1 [25.0, 35.0] 10.0 [5.0, 15.0] -20.1 [-25.0, -15.0]"
    assert row(lines, "PIER") == "PIER 105.7 [90.0, 120.0] 40.0 [30.0, 50.0] -65.7 [-80.0, -50.0]"


def test_every_backward_set_has_a_row_of_its_main_measure():
    lines = rendered(METRICS)
    assert row(lines, "backward de") == (
        "backward de WER 6.1 [4.0, 8.0] 7.3 [5.0, 10.0] +1.2 [-0.4, 2.9]"
    )
    assert row(lines, "backward fr") == (
        "backward fr WER 15.0 [10.0, 20.0] 16.2 [11.0, 21.0] +1.2 [-0.4, 2.9]"
    )


def test_raw_rates_have_a_row_where_they_differ():
    metrics = copy.deepcopy(METRICS)
    metrics["normalizer"] = "basic"
    for name, value in (("de", 0.2), ("fr", 0.15)):
        raw = {"base": rate(value, 0.1, 0.2), "adapted": rate(0.1623, 0.11, 0.21)}
        raw["change"] = change(0.0123, -0.004, 0.0289)
        for state, one in raw.items():
            metrics["backward"][name][state]["wer"]["raw"] = one
    lines = rendered(metrics)
    raws = [line for line in lines if "│ raw" in line]
    assert [" ".join(line.replace("│", " ").split()) for line in raws] == [
        "raw WER 20.0 [10.0, 20.0] 16.2 [11.0, 21.0] +1.2 [-0.4, 2.9]"
    ]
    assert "normalizer: basic; raw is without it, shown where that differs" in lines


def test_the_table_fits_a_hundred_columns():
    assert max(map(len, rendered(METRICS)[:-1])) <= 100


def test_a_rate_of_nothing_is_a_dash():
    metrics = copy.deepcopy(METRICS)
    metrics["backward_error"]["base"] = rate(None, None, None)
    metrics["backward_error"]["change"] = change(None, None, None)
    assert row(rendered(metrics), "│ backward average") == (
        "backward average – [–, –] 11.8 [9.0, 14.0] – [–, –]"
    )


def test_the_backward_average_and_the_forgetting_are_shown():
    lines = rendered(METRICS)
    assert row(lines, "│ backward average") == (
        "backward average 10.6 [8.0, 13.0] 11.8 [9.0, 14.0] +1.2 [-0.1, 2.5]"
    )
    assert row(lines, "forgetting:") == (
        "forgetting: +1.2 points [-0.1, 2.5] on the backward average"
    )


def test_sparsity_is_shown():
    assert row(rendered(METRICS), "sparsity").endswith("A 12.3%, B 50.0%, ΔW 99.7%")


def without(*names):
    return {name: value for name, value in METRICS.items() if name not in names}


def test_without_sets_it_says_that_nothing_was_measured():
    metrics = {"backward": {}, "sparsity": METRICS["sparsity"]}
    assert "nothing was measured" in " ".join(rendered(metrics))


def test_without_backward_sets_there_is_no_forgetting():
    lines = rendered({**without("backward_error"), "backward": {}})
    assert row(lines, "new domain")
    assert not any("backward" in line or "forgetting" in line for line in lines)


def test_without_a_new_domain_there_are_backward_rows_only():
    lines = rendered(without("new_domain"))
    assert row(lines, "backward de")
    assert not any("new domain" in line for line in lines)


@pytest.mark.parametrize("name", ["[bold]set", "[/] of /[x]", "sets/[de].jsonl"])
def test_brackets_in_a_name_are_shown_as_they_are(name):
    metrics = {**METRICS, "new_domain": {**METRICS["new_domain"], "name": name}}
    metrics["backward"] = {name: METRICS["backward"]["de"]}
    lines = rendered(metrics)
    assert row(lines, f"new domain {name}")
    assert row(lines, f"backward {name}")


def test_a_long_name_costs_no_digit():
    name = "/home/somebody/corpora/of/a/very/long/name/that/goes/on/and/on/test.jsonl"
    metrics = {**METRICS, "backward": {name: METRICS["backward"]["de"]}}
    cells = " ".join(" ".join(rendered(metrics)).split())
    for figures in ("6.1 [4.0, 8.0]", "7.3 [5.0, 10.0]", "+1.2 [-0.4, 2.9]", "65.4 [60.1, 70.9]"):
        assert figures in cells


def test_tables_are_printed_to_stdout_and_further_lines_as_they_are(capsys):
    print_tables(fit_tables(METRICS), "run folder: runs/[a]/" + "x" * 150)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "run folder: runs/[a]/" + "x" * 150
    assert "65.4 [60.1, 70.9]" in out


def test_the_best_dev_error_is_told_at_the_end():
    errors = [{"step": 50, "error": 0.1234}, {"step": 100, "error": 0.2}]
    dev = {"errors": errors, "best_step": 50, "ended_by": "steps"}
    assert dev_line(dev) == "dev error 12.3% after step 50, the best; of 100 steps"
    early = dev_line({**dev, "ended_by": "patience"})
    assert early == "dev error 12.3% after step 50, the best; stopped early, after 100 steps"


# ---- diagnose and priors

BLOCK = "model.decoder.layers.2."
NONE = {"A": None, "B": None}


def factor_row(name, kl):
    return FactorSummary(f"{BLOCK}fc1", name, 500, 0.5, 1.5, 0.6, 0.25, kl, None, 0.05)


SUMMARY = Summary(
    prior="horseshoe",
    prior_args={"scale": 0.05, "global_scale": 0.01},
    guide="horseshoe",
    rank=2,
    factors=(factor_row("A", 600.0), factor_row("B", 1400.0)),
    updates=(UpdateSummary(f"{BLOCK}fc1", 0.98, 0.02, (0.9, 0.4), (0.1, 0.5), 1.8, 1),),
    scales_kl={"tau": 500.0},
)
KIND = KindSummary(
    kind="cross out_proj",
    layers=3,
    contraction={"A": 0.514, "B": -0.2},
    signal_to_noise={"A": 0.25, "B": 1.5},
    near_zero=0.123,
    kl={"A": 600.4, "B": 1_234_567.0},
    kl_share=0.8,
    kl_per_weight=0.0421,
    effective_rank=1.84,
    directions=0.7,
    relative_norm=0.0213,
    active_ranks={"A": 0.5, "B": 1.25},
)
DIAGNOSIS = Diagnosis(
    run=Path("runs/[a]"),
    beta=1e-4,
    num_weights=1000,
    summary=SUMMARY,
    kinds=(KIND,),
    shrinkage=Shrinkage(1, 1.0, 2, 1.8, 0.25, 7.0, 1, 0.1, 0.4, 1, 1.2, 0.5),
    explanation="It [shrinks] so.",
    khat=Khat(5.678, "That is high.", 30, 64, 400),
    plots=(Path("runs/[a]/diagnostics/kl.png"), Path("runs/[a]/diagnostics/kl.pdf")),
)


def shown(lines, width=110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def squeezed(line) -> str:
    return " ".join(line.split())


def test_a_diagnosis_begins_with_what_was_fitted_and_its_kl():
    first, second, *_ = shown(diagnosis_tables(DIAGNOSIS))
    assert first == (
        "runs/[a]: prior horseshoe (scale 0.05, global_scale 0.01), guide horseshoe, rank 2, "
        "beta 0.0001, 1,000 adapter weights"
    )
    assert second == ("KL(q || p): 2,500 nats, 2.500 a weight; 20.0% of it is the prior's scales")


def test_points_have_no_kl():
    points = dataclasses.replace(SUMMARY, factors=(factor_row("A", None),), scales_kl={})
    lines = shown(diagnosis_tables(dataclasses.replace(DIAGNOSIS, summary=points)))
    assert "infinite" in lines[1]
    half = dataclasses.replace(SUMMARY, factors=(factor_row("A", 5.0), factor_row("B", None)))
    lines = shown(diagnosis_tables(dataclasses.replace(DIAGNOSIS, summary=half)))
    assert "without the factors that are points" in lines[1]


def test_every_kind_of_layer_has_a_row_with_the_figures_of_a_and_b():
    lines = shown(diagnosis_tables(DIAGNOSIS))
    (line,) = [line for line in lines if "cross out" in line]
    assert squeezed(line) == (
        "cross out 0.51 -0.20 0.25 1.50 12% 600 1.23M 0.042 80.0% 1.8 0.7 2.1 0.5 1.2"
    )


def test_figures_that_do_not_exist_are_dashes_and_active_ranks_are_the_horseshoe_s():
    none = dataclasses.replace(
        KIND,
        contraction=NONE,
        signal_to_noise=NONE,
        kl=NONE,
        kl_share=None,
        kl_per_weight=None,
        relative_norm=None,
        active_ranks=NONE,
        directions=None,
    )
    lines = shown(diagnosis_tables(dataclasses.replace(DIAGNOSIS, kinds=(none,))))
    (line,) = [line for line in lines if "cross out" in line]
    assert squeezed(line) == "cross out – – – – 12% – – – – 1.8 – –"
    assert not any("active" in line for line in lines)


def test_layers_are_shown_with_singular_values_and_their_spread():
    lines = shown(diagnosis_tables(DIAGNOSIS))
    (line,) = [line for line in lines if "decoder 2 fc1" in line]
    assert squeezed(line) == "decoder 2 fc1 0.98 1 of 2 0.900 ± 0.100, 0.400 ± 0.500"
    update = dataclasses.replace(SUMMARY.updates[0], singular_stddevs=(0.0, 0.0))
    point = dataclasses.replace(SUMMARY, updates=(update,))
    lines = shown(diagnosis_tables(dataclasses.replace(DIAGNOSIS, summary=point)))
    (line,) = [line for line in lines if "decoder 2 fc1" in line]
    assert squeezed(line) == "decoder 2 fc1 0.98 – 0.900, 0.400"


def test_explanation_khat_and_plots_are_told():
    lines = shown(diagnosis_tables(DIAGNOSIS))
    assert "How this prior shrinks. It [shrinks] so." in lines
    assert (
        "k-hat of the fit: 5.68 (30 draws, 64 of 400 training utterances). That is high." in lines
    )
    assert lines[-1] == "plots (and as .pdf) in runs/[a]/diagnostics: kl.png"
    bare = dataclasses.replace(DIAGNOSIS, khat=Khat(None, "not computed: beta"), plots=())
    assert shown(diagnosis_tables(bare))[-1] == "k-hat of the fit: not computed: beta"


def test_the_tables_of_a_diagnosis_fit_into_a_terminal_of_96_columns():
    lines = shown([one for one in diagnosis_tables(DIAGNOSIS) if not isinstance(one, str)], 96)
    assert not any("…" in line for line in lines)


def test_every_prior_is_listed_with_arguments_and_defaults():
    lines = shown(prior_tables({name: describe_prior(name) for name in FAMILIES}))
    for name in FAMILIES:
        assert any(f"│ {name} " in line for line in lines)
    row = next(line for line in lines if "global_scale" in line)
    assert "0.01" in row
    text = " ".join(lines)
    assert "--prior-arg" in text and "PATH.py" in text


def curve(fit_forgetting):
    def point(strength, new, backward, forgotten, removed):
        figures = {"new_domain": new, "backward_error": backward, "forgetting": forgotten}
        return {"strength": strength, **figures, "forgetting_removed": removed}

    points = [
        point(0, rate(0.5, 0.4, 0.6), rate(0.05, 0.04, 0.06), change(0, 0, 0), 1.0),
        point(0.5, rate(0.25, 0.2, 0.3), rate(0.06, 0.05, 0.07), change(0.01, 0, 0.02), None),
        point(1, rate(0.1, 0.05, 0.2), rate(0.0712, 0.06, 0.08), fit_forgetting, 0.0),
    ]
    head = {"split": "dev", "strength_by": "scale", "new_domain": "[de]", "metric": "wer"}
    return {**head, "points": points, "plot": "runs/a/strength.png"}


def test_a_curve_is_a_row_a_strength():
    lines = strength_tables(curve(change(0.0212, 0.01, 0.03)))
    console = Console(file=io.StringIO(), width=110, highlight=False)
    for line in lines:
        console.print(line)
    out = console.file.getvalue()
    rows = [[cell.strip() for cell in r.split("│")[1:-1]] for r in out.splitlines() if "│" in r]
    assert rows == [
        ["base 0", "50.0 [40.0, 60.0]", "5.0 [4.0, 6.0]", "+0.0 [0.0, 0.0]", "100%"],
        ["0.5", "25.0 [20.0, 30.0]", "6.0 [5.0, 7.0]", "+1.0 [0.0, 2.0]", "–"],
        ["fit 1", "10.0 [5.0, 20.0]", "7.1 [6.0, 8.0]", "+2.1 [1.0, 3.0]", "0%"],
    ]
    for words in ("on the dev sets, by scale", "new domain [de]", "WER", "runs/a/strength.png"):
        assert words in out
    assert "chance" not in out


def test_a_curve_says_where_its_forgetting_may_be_chance():
    assert "chance" in strength_tables(curve(change(0.0212, -0.01, 0.03)))[1]


def test_the_table_says_the_strength_and_the_dev_sets():
    out = "\n".join(rendered({**METRICS, "split": "dev", "strength": 0.5, "strength_by": "scale"}))
    assert "on the dev sets, before and after" in out
    assert "adapted: at strength 0.5 by scale" in out
    assert "dev" not in "\n".join(rendered({**METRICS, "split": "test"}))
