import json

import pytest

from blora_pyro.data import BadRow, load_mixture
from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.data_check import check_data
from blora_pyro.errors import UserError
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.options import FitConfig
from blora_pyro.posterior.inference_data import MIN_RATIOS
from blora_pyro.runs import finished, fits, scoring
from blora_pyro.runs.diagnosis import measure_khat
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import SKIPPED
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader, load_examples, without_bad_tags
from blora_pyro.runs.scoring import evaluation_sets


class Notes(Listener):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.counts = [], []

    def note(self, text):
        self.notes.append(text)

    def features(self, name, done, total):
        self.counts.append((name, done, total))


@pytest.fixture
def spoilt(tones_folder, tmp_path):
    """The tones; two bad rows to train on, and one to test."""
    for name in ("train", "test"):
        rows = (tones_folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(row) for row in rows]
        for row in rows:
            row["audio"] = str(tones_folder / row["audio"])
        one = {**rows[0], "word_languages": ["de"]}
        bad = ["?", {**rows[0], "language": "fr"}] if name == "train" else [one]
        lines = [row if isinstance(row, str) else json.dumps(row) for row in (*bad, *rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def options(fit_options, spoilt):
    return {**fit_options, "data": str(spoilt), "steps": 3, "backward": ()}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- bad rows


def test_a_fit_stops_at_a_bad_row(options):
    with pytest.raises(UserError, match=r"train.jsonl, line 1: not JSON"):
        fit(FitConfig(**options))


def test_a_fit_leaves_bad_rows_out_and_lists_them(options, fit_options, tmp_path):
    progress, folder = Notes(), tmp_path / "run"
    run = fit(FitConfig(on_bad_row="skip", **options), folder, progress=progress)
    clean = {**options, "data": fit_options["data"]}
    clean = fit(FitConfig(**clean), tmp_path / "clean")
    assert run.history == clean.history
    expected = clean.metrics["new_domain"] | {"name": options["data"]}
    assert run.metrics["new_domain"] == expected
    rows = [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]
    assert [row["reason"].split(":")[0].split(" of ")[0] for row in rows] == [
        "not JSON",
        "the tokenizer does not know the language 'fr'",
        "'das red' has 2 words but 1 word_languages; give one for each word",
    ]
    source = options["data"]
    assert [(row["source"], row["split"]) for row in rows] == [(source, "train")] * 2 + [
        (source, "test")
    ]
    assert rows[1]["origin"] == f"{source}/train.jsonl, line 2"
    bad, worth_a_look = progress.notes
    assert bad == (
        f"bad rows left out: 2 of {source} train, 1 of {source} test, listed in {folder}/{SKIPPED};"
        f" the first: {source}/train.jsonl, line 1: not JSON: '?'"
    )
    told = f"rows worth a look: text that is in another set too: 2 of {source} test; the first: "
    assert worth_a_look.startswith(told)
    about = read_json(folder / "run.json")
    assert about["training_tokens"] == read_json(tmp_path / "clean/run.json")["training_tokens"]
    again = Notes()
    assert evaluate_run(folder, progress=again) == run.metrics
    assert again.notes[0].startswith(f"bad rows left out: 1 of {source} test; the first:")


def test_a_run_without_bad_rows_lists_none_and_an_earlier_list_goes(options, fit_options, tmp_path):
    fit(FitConfig(on_bad_row="skip", **options), tmp_path / "run")
    assert (tmp_path / "run" / SKIPPED).exists()
    progress = Notes()
    clean = {**options, "data": fit_options["data"], "on_bad_row": "skip"}
    fit(FitConfig(**clean), tmp_path / "run", overwrite=True, progress=progress)
    assert not (tmp_path / "run" / SKIPPED).exists()
    assert not any("bad rows" in note for note in progress.notes)


class Stop(Exception):
    """Stands for a kill."""


def test_a_fit_goes_on_without_the_same_rows_and_not_without_others(
    options, spoilt, tones_folder, tmp_path
):
    class Kill(Notes):
        def step(self, step):
            if step.step == 2:
                raise Stop

    given = {**options, "on_bad_row": "skip"}
    whole = fit(FitConfig(**given))
    with pytest.raises(Stop):
        fit(FitConfig(**given), tmp_path / "run", checkpoint_every=1, progress=Kill())
    lines = (spoilt / "train.jsonl").read_text(encoding="utf-8").splitlines()
    others = [lines[0], lines[1], lines[3], lines[2]]
    (spoilt / "train.jsonl").write_text("\n".join(others), encoding="utf-8")
    with pytest.raises(UserError, match=r"another fit: training_data was .*; bring back"):
        fit(output=tmp_path / "run", resume=True)
    (spoilt / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = fit(output=tmp_path / "run", resume=True)
    assert run.history == whole.history
    assert len((tmp_path / "run" / SKIPPED).read_text().splitlines()) == 3


def test_nothing_but_bad_rows_is_refused(fluent_base, spoilt):
    (spoilt / "test.jsonl").write_text("?", encoding="utf-8")
    loader = Loader(fluent_base, FitConfig(on_bad_row="skip"))
    with pytest.raises(UserError, match=r"all rows are bad \(1\); the first: .*line 1: not JSON"):
        loader.load(str(spoilt), "test")


def test_languages_of_words_that_do_not_fit_are_bad_where_they_are_scored(spoilt, fluent_base):
    dataset = load_mixture(str(spoilt), "test")
    with pytest.raises(BadRow, match=r"test.jsonl, line 1: 'das red' has 2 words but 1"):
        load_examples(fluent_base, str(spoilt), "test")
    bad: list[BadRow] = []
    assert without_bad_tags(dataset, bad.append)["text"][:] == ["das red", "ein bicycle"]
    with pytest.raises(UserError, match="all rows are bad"):
        without_bad_tags(dataset.select([0]), bad.append)
    (spoilt / "train.jsonl").write_text((spoilt / "test.jsonl").read_text(), encoding="utf-8")
    assert len(load_examples(fluent_base, str(spoilt), "train")) == 3


def test_k_hat_leaves_them_out_too(options):
    run = fit(FitConfig(on_bad_row="skip", **options), evaluate=False)
    found = measure_khat(run.posterior, summarise(run.posterior), run.config, MIN_RATIOS)
    assert found.utterances == 2


# ---- languages and tasks


@pytest.fixture
def nameless(tones_folder, tmp_path):
    """A manifest of rows that name no language."""
    path = tmp_path / "rows.jsonl"
    row = {"audio": str(tones_folder / "en0.wav"), "text": "the red"}
    path.write_text(json.dumps(row), encoding="utf-8")
    return str(path)


def test_a_set_that_is_called_by_a_language_has_it(fluent_base, nameless):
    backward = {"en": nameless, "German": nameless, "radio": nameless}
    config = FitConfig(data=nameless, test=nameless, backward=backward, language="de-en")
    sets = evaluation_sets(fluent_base, config)
    assert {name: examples.languages for name, examples in sets.items()} == {
        "new_domain": ["de-en"],
        "en": ["en"],
        "German": ["de"],
        "radio": ["de-en"],
    }
    with pytest.raises(UserError, match="no language given"):
        load_examples(fluent_base, nameless, "test")
    assert load_examples(fluent_base, nameless, "test", language="DE").languages == ["de"]


def test_the_task_is_in_every_prompt(fluent_base, options, fit_options, monkeypatch):
    translate = fluent_base.tokenizer.get_vocab()["<|translate|>"]
    prompts = []

    def transcribe(base, examples, shares_encoder, on_done):
        prompts.extend(examples.prompts)
        return ["x"] * len(examples)

    monkeypatch.setattr(scoring, "transcribe_examples", transcribe)
    run = fit(FitConfig(**{**fit_options, "steps": 1, "task": "translate"}))
    assert run.config.task == "translate"
    assert len(prompts) == 12 and all(prompt[-2] == translate for prompt in prompts)


def test_a_language_unknown_to_the_base_is_refused(fit_options, tones_folder, fluent_folder):
    with pytest.raises(UserError, match="does not know the language 'klingon'"):
        fit(FitConfig(**{**fit_options, "language": "klingon"}), evaluate=False)
    with pytest.raises(UserError, match="does not know the language 'fr'"):
        check_data(str(tones_folder), str(fluent_folder), language="French")


def test_an_adapter_transcribes_by_its_task(fit_options, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(finished, "transcribe_files", lambda *given: seen.append(given[0]) or [])
    fit(
        FitConfig(**{**fit_options, "steps": 1, "task": "translate"}),
        tmp_path / "run",
        evaluate=False,
    )
    finished.transcribe(["a.wav"], tmp_path / "run")
    assert [(one.language, one.task) for one in seen] == [("de-en", "translate")]


# ---- features


def test_the_caller_hears_of_the_features(fit_options, tones_folder, tmp_path):
    progress = Notes()
    fit(FitConfig(**{**fit_options, "steps": 1}), progress=progress)
    names = [f"{tones_folder} train", f"{tones_folder} test"]
    names += [f"{tones_folder}/{name}.jsonl test" for name in ("de", "en")]
    assert progress.counts == [(name, 2, 2) for name in names]


def test_a_cache_that_cannot_be_written_ends_no_fit(fit_options, monkeypatch, tmp_path):
    config = FitConfig(**{**fit_options, "steps": 2, "backward": ()})
    expected = fit(config, evaluate=False).history
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "file"))
    progress = Notes()
    run = fit(config, progress=progress)
    assert run.history == expected
    assert sum("can't be written" in note for note in progress.notes) == 1


def test_skipped_steps_are_told_at_the_end(fit_options, tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "fit_guide", lambda *a, **k: fit_guide(*a, **k)[1:])
    progress = Notes()
    config = FitConfig(**{**fit_options, "steps": 3})
    fit(config, tmp_path / "run", evaluate=False, progress=progress)
    assert any(note.startswith("1 of 3 steps were skipped, because") for note in progress.notes)
    assert read_json(tmp_path / "run" / "run.json")["skipped_steps"] == 1
