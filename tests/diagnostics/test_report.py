import dataclasses
import io
from collections import Counter
from pathlib import Path

from rich.console import Console

from blora_pyro.diagnostics import FactorSummary, Summary, UpdateSummary
from blora_pyro.diagnostics.data_check import DataCheck, Finding, SetCheck
from blora_pyro.diagnostics.explanations import Shrinkage
from blora_pyro.diagnostics.khat import Khat, Loo
from blora_pyro.diagnostics.layers import KindSummary
from blora_pyro.diagnostics.report import (
    Diagnosis,
    closing_lines,
    data_check_tables,
    figure_tables,
    prior_tables,
)
from blora_pyro.families import FAMILIES
from blora_pyro.guides import describe_prior

BLOCK = "model.decoder.layers.2."
NONE = {"A": None, "B": None}


def diagnosis_tables(found):
    return [*figure_tables(found), *closing_lines(found)]


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


def shown(parts, width=110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
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


def test_explanation_khat_and_plots_are_shown():
    lines = shown(diagnosis_tables(DIAGNOSIS))
    assert "How this prior shrinks. It [shrinks] so." in lines
    assert (
        "k-hat of the fit: 5.68 (30 draws, 64 of 400 training utterances). That is high." in lines
    )
    assert lines[-1] == "plots (and as .pdf) in runs/[a]/diagnostics: kl.png"
    loo = Loo(-100.0, 5.0, 0.0, 0.5, 1.0, 50)
    both = dataclasses.replace(DIAGNOSIS, khat=dataclasses.replace(DIAGNOSIS.khat, loo=loo))
    whole = " ".join(shown(diagnosis_tables(both)))
    assert "leave one out (PSIS-LOO of these utterances): elpd -100.0 ± 5.0 nats" in whole
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


def written(found) -> str:
    return " ".join(" ".join(shown(data_check_tables(found))).split())


def checked(*findings, **figures) -> SetCheck:
    counts = Counter(one.kind for one in findings)
    bad = {one.origin for one in findings if one.refused}
    one = SetCheck("[red]", "", 1, 0.0, None, {}, {}, {}, [*findings], dict(counts), len(bad))
    return dataclasses.replace(one, **figures)


def test_what_many_rows_have_in_common_is_told_once():
    findings = [
        Finding("transcript", f"a.csv, line {i}", "no such language") for i in range(2, 916)
    ]
    text = written(DataCheck(None, None, [checked(*findings)]))
    assert "914 text or language" in text
    assert text.count("no such language") == 1
    assert "a.csv, line 2 and 913 more: no such language" in text


def test_without_a_base_it_is_told_that_there_is_more_to_check():
    text = written(DataCheck(None, None, [checked()]))
    assert "data, checked without a base" in text
    assert "a fit would take every row, if its base takes" in text


def test_checked_data_are_shown_with_three_examples_of_each_finding():
    bad = [Finding("row", f"a.csv, line {i}", f"not JSON: '{i}'") for i in range(2, 7)]
    note = Finding("empty text", "a.csv, line 7", "it is empty")
    lengths = {"min": 0.25, "median": 0.5, "max": 0.75}
    figures = {"seconds": lengths, "sampling_rates": {16_000: 3, 8_000: 1}, "channels": {1: 4}}
    one = checked(*bad, note, rows=9, **figures)
    text = written(DataCheck("pocket", 30, [one]))
    for part in (
        "data for the base pocket, which takes 30 s at a time",
        "9 0.00 0.25 0.50 0.75 16000: 3, 8000: 1 1",
        "a fit would refuse",
        "5 rows that can't be read",
        "line 4: not JSON: '4'",
        "worth knowing",
        "a fit would stop at 5 bad rows; --on-bad-row skip",
    ):
        assert part in text
    assert "line 5: not JSON" not in text
    clean = written(DataCheck("pocket", 30, [checked()]))
    assert "a fit would take every row" in clean and "refuse" not in clean


def test_names_in_brackets_are_shown_as_they_are():
    finding = Finding("row", "[red]a.csv, line 1", "[bold]")
    text = written(DataCheck("[x]", 30, [checked(finding)]))
    assert "[red]a.csv, line 1: [bold]" in text and "– – –" in text and "base [x]" in text
