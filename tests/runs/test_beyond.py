import numpy as np
import pytest

from blora_pyro.errors import UserError
from blora_pyro.runs import beyond
from blora_pyro.runs.beyond import measure_beyond
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.report import beyond_tables
from blora_pyro.tables import report_text


@pytest.fixture
def sets(fluent_base, tones_folder):
    return {
        name: load_examples(fluent_base, str(tones_folder / f"{name}.jsonl"), "test")
        for name in ("de", "en")
    }


def test_an_adapter_that_changes_nothing_is_as_the_base(fluent_base, sets, random_posterior):
    found = measure_beyond(fluent_base, sets, random_posterior(0, alpha=0.0))
    for key in ("language", "punctuation", "silence"):
        assert found[key]["base"] == found[key]["adapted"]
        assert found[key]["change"]["difference"] == 0
    assert found["utterances"] == {"de": 2, "en": 2}
    assert found["punctuation"]["base"]["rate"] == 1  # its texts have none
    assert found["capital"]["base"]["rate"] == 1
    assert {*found.get("translation", {}).values()} <= {100.0}


def test_what_an_adapter_ruins_is_told(fluent_base, sets, random_posterior, monkeypatch):
    spoiled = random_posterior(0, alpha=500.0)
    monkeypatch.setattr(beyond, "LEVELS", (None, -20.0))
    found = measure_beyond(fluent_base, sets, spoiled)
    wrong = {key: found[key]["adapted"]["rate"] for key in ("language", "silence")}
    assert wrong["language"] >= found["language"]["base"]["rate"]
    text = report_text(beyond_tables(found))
    assert "language taken for another" in text and "4 utterances" in text


def test_zeros_are_never_words(fluent_base):
    counts = beyond._silence(fluent_base)
    assert counts.edits[:2].tolist() == [0, 0] and counts.lengths.tolist() == [1] * 12


@pytest.mark.parametrize(
    ("text", "is_capital"),
    [("Ja.", True), ("¿Qué?", True), ("ja", False), ("", False), ("字", False)],
)
def test_capitals_are_those_of_the_first_letter(text, is_capital):
    assert beyond._begins_with_capital(text) is is_capital


def test_utterances_are_evenly_spaced():
    assert beyond._evenly(120, 50) == [*range(0, 120, 3)]
    assert beyond._evenly(3, 50) == [0, 1, 2] and beyond._evenly(0, 50) == []


def test_shares_are_averaged_over_the_sets_that_count():
    counts = [beyond._counts([(True, True), (False, True), (True, False)]), beyond._counts([])]
    assert beyond._compared("x", counts, counts)["x"]["base"]["rate"] == 0.5
    assert beyond._compared("x", counts[1:], counts[1:]) == {}
    assert np.array_equal(counts[0].edits, [1, 0, 0])


def test_a_run_without_backward_sets_is_refused(fluent_base, random_posterior):
    with pytest.raises(UserError, match="no backward sets; give a run with some"):
        measure_beyond(fluent_base, {}, random_posterior(0))


def test_without_sacrebleu_the_extra_is_named(fluent_base, sets, random_posterior, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"pip install 'blora-pyro\[beyond\]'"):
        measure_beyond(fluent_base, sets, random_posterior(0))


def test_it_is_part_of_an_evaluation_that_asks_for_it(finished_run):
    metrics = evaluate_run(finished_run.output, beyond=True)
    assert {*metrics["beyond"]["utterances"]} == {*metrics["backward"]}
