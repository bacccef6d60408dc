import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blora_pyro.errors import UserError
from blora_pyro.runs.shown import ShownRun, in_words, show_run, side_by_side
from blora_pyro.tables import report_text


@pytest.fixture
def one(finished_run) -> ShownRun:
    return ShownRun.read(finished_run.output)


@pytest.fixture
def other(one) -> ShownRun:
    """The run as if it had been adapted to nothing, with another beta and seed."""
    base = {(row["set"], row["utterance"]): row for row in one.rows if row["state"] == "base"}
    kept = ("metric", "reference", "hypothesis", "edits", "length", "rate", "pier", "alignment")

    def unadapted(row):
        old = base[row["set"], row["utterance"]]
        rest = {name: value for name, value in row.items() if name not in kept}
        return {**rest, **{name: old[name] for name in kept if name in old}}

    metrics = json.loads(json.dumps(one.metrics))
    sets = [metrics["new_domain"], *metrics["backward"].values(), metrics["backward_error"]]
    for both in sets:
        both["adapted"] = both["base"]
    config = replace(one.record.resolved, beta=1e-3, seed=7)
    rows = [unadapted(row) for row in one.rows]
    return replace(
        one, name="other", record=replace(one.record, config=config), metrics=metrics, rows=rows
    )


def test_a_run_is_shown_with_its_errors_sizes_and_options(one, finished_run):
    content, parts = show_run(one)
    text = report_text(parts)
    assert text.startswith(f"{finished_run.output}: finished")
    for words in (*finished_run.table.splitlines(), "target tokens N", "adapter weights"):
        assert words in text
    row = next(line.split() for line in text.splitlines() if "--beta" in line)
    assert row == ["--beta", "1e-05"]
    assert "--device" not in text
    assert content["metrics"] == finished_run.metrics
    assert content["run"]["config"] == finished_run.config.to_json() | {
        name: content["run"]["config"][name] for name in ("data", "backward", "track")
    }
    assert "history" not in json.loads(json.dumps(content, allow_nan=False))["run"]


def test_an_unfinished_run_is_shown_as_far_as_it_has_come(old_runs):
    content, parts = show_run(ShownRun.read(old_runs / "unfinished"))
    text = report_text(parts)
    assert content["state"] == "interrupted" and content["metrics"] == {}
    assert "nothing is measured yet" in text and "--distillation" in text
    with pytest.raises(UserError, match=r"run\.json is missing or damaged"):
        ShownRun.read(old_runs)


def test_differences_are_of_the_same_utterances_with_paired_intervals(one, other):
    content, parts = side_by_side(one, other)
    assert content["options"] == {"beta": [1e-5, 1e-3], "seed": [0, 7]}
    assert content["notes"] == []
    # B is the base: what was learned and forgotten is the difference, with the other sign.
    found = content["sets"]["new_domain"]["measures"]
    assert [*found] == ["wer", "pier"]
    for measure, figures in found.items():
        own = one.metrics["new_domain"]
        assert figures["rates"][0]["rate"] == own["adapted"][measure]["rate"]
        assert figures["rates"][0]["interval"] == own["adapted"][measure]["interval"]
        change = own["change"][measure]
        assert figures["change"]["difference"] == pytest.approx(-change["difference"])
        assert figures["change"]["interval"] == pytest.approx(
            [-x for x in change["interval"][::-1]]
        )
    average = one.metrics["backward_error"]
    assert content["backward_error"]["rates"][0] == {
        name: average["adapted"][name] for name in ("rate", "interval")
    }
    lost = average["change"]["difference"]
    assert lost > 0
    assert content["backward_error"]["change"]["difference"] == pytest.approx(-lost)
    forgetting = content["forgetting"]
    assert [rate["difference"] for rate in forgetting["rates"]] == [lost, 0]
    assert forgetting["change"] == content["backward_error"]["change"]  # of one base
    text = report_text(parts)
    for words in (f"A: {one.name}, finished", "B: other", "B − A", "--seed", "new domain", "PIER"):
        assert words in text
    json.dumps(content, allow_nan=False)


def differently(run: ShownRun, change, name="new_domain") -> ShownRun:
    """The run with the rows of a set, in both states, changed."""
    rows = [row | change(row) if row["set"] == name else row for row in run.rows]
    return replace(run, rows=rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: {"reference": "x"} if row["utterance"] else {}, "utterance 1 has another ref"),
        (lambda row: {"audio": "/elsewhere/x.wav"}, "utterance 0 has another recording"),
        (lambda row: {"start": 1.0}, "utterance 0 has another segment"),
        (lambda row: {"reference": None}, "an old version kept no references"),
        (lambda row: {"edits": 2 + row["edits"]}, "of B were not measured together"),
        (
            lambda row: {"edits": row["edits"] + (row["state"] == "base")},
            "of B were not measured together",
        ),
    ],
)
def test_sets_that_are_not_the_same_have_no_difference_and_a_line_says_so(one, change, words):
    content, parts = side_by_side(one, differently(one, change))
    (note,) = content["notes"]
    assert note.startswith("no difference on new_domain: ") and words in note
    assert note in report_text(parts)
    assert all(
        figures["change"] is None and None not in figures["rates"]
        for figures in content["sets"]["new_domain"]["measures"].values()
    )
    assert content["forgetting"]["change"]["difference"] == 0  # the backward sets are the same


def test_a_recording_that_has_moved_is_the_same(one):
    moved = differently(one, lambda row: {"audio": f"/elsewhere/{Path(row['audio']).name}"})
    assert side_by_side(one, moved)[0]["notes"] == []


def test_without_a_backward_set_of_both_the_average_has_no_difference(one):
    backward = list(one.metrics["backward"])
    content, _ = side_by_side(one, differently(one, lambda row: {"start": 9.0}, backward[0]))
    assert content["backward_error"]["change"] is content["forgetting"]["change"] is None
    assert content["forgetting"]["rates"][0]["difference"] > 0
    metrics = json.loads(json.dumps(one.metrics))
    metrics["backward"]["more"] = metrics["backward"].pop(backward[1])
    content, _ = side_by_side(one, replace(one, metrics=metrics))
    assert content["notes"] == [
        f"only of A: {backward[1]}",
        "only of B: more",
        f"backward average over {backward[0]}, which both have",
    ]
    assert content["backward_error"]["change"]["difference"] == 0
    assert backward[1] not in content["sets"]


def test_runs_that_were_scored_in_other_ways_have_no_differences(one):
    for name, value in (("normalizer", "whisper"), ("heard", None)):
        changed = replace(one, metrics={**one.metrics, name: value})
        content, _ = side_by_side(one, changed)
        (note,) = content["notes"]
        assert note.startswith(f"no difference is shown, for {name} is '")
        figures = [one for found in content["sets"].values() for one in found["measures"].values()]
        assert all(one["change"] is None for one in figures) and len(figures) > 2
        assert content["backward_error"]["change"] is None


def test_runs_of_which_nothing_was_measured_show_their_options(one, old_runs):
    unfinished = ShownRun.read(old_runs / "unfinished")
    content, parts = side_by_side(unfinished, one)
    assert content["notes"] == ["nothing is measured of A"] and content["sets"] == {}
    assert content["options"]["base"][0] == "pocket"
    assert "interrupted" in report_text(parts)
    same, parts = side_by_side(unfinished, unfinished)
    assert same["options"] == {} and "no option differs" in report_text(parts)


def test_rows_of_another_adapter_are_refused(finished_run, tmp_path):
    shutil.copytree(finished_run.output, tmp_path / "run")
    file = tmp_path / "run" / "utterances.jsonl"
    adapter = finished_run.metrics["adapter"]
    text = file.read_text(encoding="utf-8").replace(adapter, "0" * len(adapter))
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="was not measured with the adapter beside it"):
        ShownRun.read(tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "True"),
        (1e-5, "1e-05"),
        (0.123456, "0.1235"),
        ([1, 2.5], "1, 2.5"),
        ({"de": "a", "en": 0.5}, "de=a, en=0.5"),
    ],
)
def test_values_of_options_in_words(value, text):
    assert in_words(value) == text
    assert in_words(0.123456, 12) == "0.123456"
