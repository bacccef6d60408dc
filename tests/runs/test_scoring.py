import json
from dataclasses import replace

import pytest

from blora_pyro.errors import UserError
from blora_pyro.models import encoder_states
from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader, load_examples
from blora_pyro.runs.measurements import check_metrics
from blora_pyro.runs.report import fit_tables
from blora_pyro.runs.scoring import (
    Scoring,
    compare,
    evaluation_sets,
    measure,
    scoring_config,
)
from blora_pyro.tables import report_text


def test_no_training_data_are_scored_as_a_dev_set(fluent_base, tones_folder):
    train, test = str(tones_folder / "train.jsonl"), str(tones_folder / "test.jsonl")
    german = {"de": str(tones_folder / "de.jsonl")}
    notes = []
    for options in ({}, {"test": test}):
        config = FitConfig(data=train, backward=german, **options)
        with pytest.raises(UserError, match="has no dev split; give a set that has one"):
            evaluation_sets(fluent_base, config, split="dev")
    config = FitConfig(data=train, dev=test, eval_every=1, backward=german)
    loader = Loader(fluent_base, config, on_note=notes.append)
    sets = evaluation_sets(fluent_base, config, loader, split="dev")
    assert sets["new_domain"].texts == ["das red", "ein bicycle"]
    assert notes == [
        f"{source} is one set without splits: the same for dev as for test"
        for source in (test, german["de"])
    ]
    with pytest.raises(UserError, match="split is 'train'; give test or dev"):
        evaluation_sets(fluent_base, config, split="train")


def test_a_split_that_is_none_is_refused_before_the_base_is_loaded():
    with pytest.raises(UserError, match="split is 'train'; give test or dev"):
        Scoring.of(FitConfig(base="/nowhere"), "train", Listener())


def test_other_data_are_scored_with_their_own_columns():
    config = FitConfig(column={"text": "transcript"})
    assert scoring_config(config, None, None).column == {"text": "transcript"}
    assert scoring_config(config, "other", None).column is None
    assert scoring_config(config, "other", None, ["text=raw"]).column == {"text": "raw"}


def test_examples_under_two_names_are_transcribed_once(fluent_base, tones_folder):
    examples = load_examples(fluent_base, str(tones_folder / "de.jsonl"), "test")
    transcribed = []
    found = measure(fluent_base, {"a": examples, "b": examples}, transcribed.append)
    assert transcribed == ["a"] and found["a"].main.rate == found["b"].main.rate == 0


def test_transcripts_that_are_kept_are_only_scored(fluent_base, tones_folder, tmp_path):
    examples = load_examples(fluent_base, str(tones_folder / "de.jsonl"), "test")
    file, stages = tmp_path / "transcripts.json", []
    measure(fluent_base, {"de": examples}, stages.append, file)
    file.write_text(json.dumps({"de": ["das rote", "falsch"]}), encoding="utf-8")
    found = measure(fluent_base, {"de": examples}, stages.append, file)["de"]
    assert stages == ["de"] and found.hypotheses == ["das rote", "falsch"]


def test_kept_transcripts_of_another_set_are_not_taken(fluent_base, tones_folder, tmp_path):
    german, english = (
        load_examples(fluent_base, str(tones_folder / f"{name}.jsonl"), "test")
        for name in ("de", "en")
    )
    file, stages = tmp_path / "transcripts.json", []
    measure(fluent_base, {"x": german}, stages.append, file)
    measure(fluent_base, {"x": german}, stages.append, file)
    found = measure(fluent_base, {"x": english}, stages.append, file)["x"]
    assert stages == ["x", "x"] and found.examples == english.fingerprint
    assert found.references == english.texts


def test_scores_before_and_after_are_compared_by_set(fluent_base, tones_folder, random_posterior):
    sets = {
        name: load_examples(fluent_base, str(tones_folder / f"{file}.jsonl"), "test")
        for name, file in {"new_domain": "test", "German": "de"}.items()
    }

    class Stages(Listener):
        def stage(self, name):
            names.append(name)

    names: list[str] = []
    scoring = Scoring(fluent_base, sets, "whisper", Stages())
    before = scoring.score(None, "base")
    after = scoring.score(random_posterior(0, spread=0.0), "adapted")
    assert names == [
        f"{s} on {one}" for s in ("base", "adapted") for one in ("the new domain", "German")
    ]
    metrics = compare(random_posterior(0), before, after, FitConfig(data="mine"))
    assert metrics["new_domain"]["name"] == "mine" and list(metrics["backward"]) == ["German"]
    change = metrics["backward_error"]["change"]["difference"]
    assert change == pytest.approx(after["German"].main.rate - before["German"].main.rate)


@pytest.mark.parametrize(("targets", "heard"), [(".*decoder.*fc1", 1), (".*encoder.*fc1", 2)])
def test_an_encoder_that_is_not_adapted_hears_a_set_once(
    fluent_base, tones_folder, random_posterior, monkeypatch, targets, heard
):
    monkeypatch.setattr(encoder_states, "_kept", {})
    sets = {"German": load_examples(fluent_base, str(tones_folder / "de.jsonl"), "test")}
    scoring, calls = Scoring(fluent_base, sets, "whisper", Listener()), []
    hook = fluent_base.net.model.encoder.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = scoring.score(None)["German"]
    after = scoring.score(random_posterior(0, targets=targets))["German"]
    hook.remove()
    assert len(calls) == heard
    assert len(after.hypotheses) == len(before.hypotheses) == 2


def test_as_many_utterances_as_asked_for_are_scored_the_same_in_every_fit(
    fluent_base, tones_folder
):
    test, german = str(tones_folder / "test.jsonl"), {"de": str(tones_folder / "de.jsonl")}
    found = []
    for seed in (0, 1):
        config = FitConfig(data=test, test=test, backward=german, max_eval_utterances=1, seed=seed)
        found.append(evaluation_sets(fluent_base, config))
    assert [len(one) for one in found[0].values()] == [1, 1]
    assert [one.texts for one in found[0].values()] == [one.texts for one in found[1].values()]


# ---- drift


@pytest.fixture
def silent_set(tones_folder, tmp_path):
    """German without texts, split into dev and test."""
    for split in ("dev", "test"):
        rows = [json.loads(line) for line in (tones_folder / "de.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"text": "", "word_languages": [], "audio": str(tones_folder / row["audio"])}
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_a_backward_set_without_texts_is_scored_against_what_the_base_says(
    finished_run, silent_set, tones_folder
):
    backward = {"old": str(silent_set), "de": str(tones_folder / "de.jsonl")}
    config = replace(finished_run.config, backward=backward)
    scoring = Scoring.of(config, "test", Listener())
    assert scoring.sets["old"].texts == scoring.sets["de"].texts  # which the base knows by heart
    assert scoring.sets["old"].is_drift and not scoring.sets["de"].is_drift
    before, after = scoring.score(None), scoring.score(finished_run.posterior)
    metrics = compare(finished_run.posterior, before, after, config)
    check_metrics(metrics)
    old, de = metrics["backward"]["old"], metrics["backward"]["de"]
    assert old.pop("drift") and "drift" not in de
    assert old["base"]["wer"]["rate"] == 0 < old["adapted"]["wer"]["rate"]
    assert old["change"] == de["change"]
    old["drift"] = True
    table = report_text(fit_tables(metrics))
    assert "backward old" in table and "drift (WER)" in table
    assert "drift: against what the base itself says, for the set has no texts" in table


def test_a_backward_set_with_and_without_texts_is_refused(fluent_base, silent_set, tones_folder):
    file = silent_set / "test.jsonl"
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    row = json.loads(first) | {"text": "das rote"}
    file.write_text("\n".join([json.dumps(row), *rest]), encoding="utf-8")
    config = FitConfig(data=str(tones_folder), backward={"old": str(silent_set)})
    words = r"old has 1 utterances without a text and 1 with one .*test.jsonl, line 2\); give texts"
    with pytest.raises(UserError, match=words):
        evaluation_sets(fluent_base, config)
