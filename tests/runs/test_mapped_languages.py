"""Languages that the base has no token for, through a run and whatever is made of it."""

import json

import pytest
from safetensors import safe_open

from blora_pyro.data import prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.fits import fit
from blora_pyro.runs.record import RunRecord
from blora_pyro.transcription import long_form

from .conftest import Notes


@pytest.fixture(scope="module")
def kichwa(tones_folder, tmp_path_factory):
    """The code-switched tones as a language without a token, mixed with English."""
    folder = tmp_path_factory.mktemp("kichwa")
    for name in ("train", "test"):
        rows = [
            json.loads(line) for line in (tones_folder / f"{name}.jsonl").read_text().splitlines()
        ]
        for row in rows:
            row |= {"audio": str(tones_folder / row["audio"]), "language": "qu-en"}
            row["word_languages"] = ["qu", "en"]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def options(fit_options, kichwa):
    return {**fit_options, "data": str(kichwa), "steps": 2, "language_map": ["qu=de"]}


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    return fit(FitConfig(**options), tmp_path_factory.mktemp("runs") / "mapped")


@pytest.fixture
def prompts(monkeypatch):
    """The languages of every prompt that a transcript is made with."""
    used = []

    def spied(tokenizer, language, task, language_map):
        ids = prompt_ids(tokenizer, language, task, language_map)
        used.append("".join(tokenizer.convert_ids_to_tokens(ids[1:-2])))
        return ids

    monkeypatch.setattr(long_form, "prompt_ids", spied)
    return used


def test_a_run_keeps_its_map_and_the_language_that_was_spoken(run):
    record = RunRecord.read(run.output)
    assert record.resolved.language_map == run.posterior.language_map == {"qu": "de"}
    assert record.language == "qu-en"
    assert Posterior.load(run.output).language_map == {"qu": "de"}
    with safe_open(run.output / "adapter_model.safetensors", framework="pt") as weights:
        assert json.loads(weights.metadata()["language_map"]) == {"qu": "de"}
    assert run.metrics["new_domain"]["base"]["pier"]  # at the words of `en`


def test_an_adapter_transcribes_in_its_language_without_a_word_about_the_map(
    run, tones_folder, prompts
):
    audio = [tones_folder / "test4.wav"]
    (own,) = transcribe(audio, run.output)
    assert own.language == "qu-en"
    transcribe(audio, run.output, language="qu")
    transcribe(audio, run.output, language="en")
    assert prompts == ["<|de|><|en|>", "<|de|>", "<|en|>"]


def test_a_merged_model_and_a_run_as_base_know_it_too(run, tmp_path, kichwa, options):
    merge_run(run.output, tmp_path / "merged")
    for base in (tmp_path / "merged", run.output):
        assert load_base(str(base)).language_map == {"qu": "de"}
    later = {**options, "base": str(run.output), "language_map": "none", "steps": 1}
    assert fit(FitConfig(**later), evaluate=False).config.language_map == {"qu": "de"}


def test_a_run_is_evaluated_and_continued_with_its_map(run, kichwa, options):
    again = evaluate_run(run.output)
    assert again["new_domain"] == run.metrics["new_domain"]
    known = {name: options[name] for name in ("data", "backward", "batch_size")}
    later = FitConfig(**known, prior_from=str(run.output), steps=1, language_map="none")
    assert fit(later, evaluate=False).posterior.language_map == {"qu": "de"}


def test_a_pair_has_a_token_of_its_own_where_the_map_says_so(options):
    config = FitConfig(**{**options, "language_map": "qu-en=de", "steps": 1})
    assert fit(config, evaluate=False).posterior.language_map == {"qu-en": "de"}


@pytest.mark.parametrize(("backward", "noted"), [("de", 1), ("en", 0)])
def test_a_token_that_a_backward_set_needs_is_noted(options, tones_folder, backward, noted):
    heard = Notes()
    sets = {backward: str(tones_folder / f"{backward}.jsonl")}
    fit(FitConfig(**{**options, "backward": sets, "steps": 1}), evaluate=False, progress=heard)
    notes = [note for note in heard.notes if "takes the token of the backward set de" in note]
    assert len(notes) == noted


def test_a_language_with_a_token_is_heard_under_no_other(options):
    given = {**options, "language_map": ["qu=de", "en=de"]}
    with pytest.raises(UserError, match="language_map has en=de, but the base has a token for en"):
        fit(FitConfig(**given))


def test_without_a_map_a_language_that_has_no_token_is_refused(options):
    with pytest.raises(UserError, match=r"language 'qu' .*language_map qu=TOKEN"):
        fit(FitConfig(**{**options, "language_map": "none"}))
