"""Fits on a stream: from the command line to a resumed end."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from blora_pyro import FitConfig
from blora_pyro.errors import UserError
from blora_pyro.fitting.checkpoints import FILE, from_bytes, write_checkpoint
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import SKIPPED
from blora_pyro.runs.listeners import Listener


class Crash(Exception):
    """Stands for the end of the process."""


class Crashing(Listener):
    def __init__(self, at=None):
        self.at, self.steps, self.notes, self.known = at, [], [], []

    def step(self, step):
        self.steps.append(step.step)
        if step.step == self.at:
            raise Crash

    def note(self, text):
        self.notes.append(text)

    def ready(self, config, num_tokens, num_weights):
        self.known.append((config.shuffle_buffer, num_tokens))


@pytest.fixture(scope="module")
def corpus(tones_folder, tmp_path_factory):
    """Nine rows in three parquet shards, of which two are bad, and the test set."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copy(tones_folder / "test.jsonl", folder)
    for wav in tones_folder.glob("test*.wav"):
        shutil.copy(wav, folder)
    lines = [json.loads(line) for line in (tones_folder / "train.jsonl").read_text().splitlines()]
    rows = [
        {
            "audio": {"bytes": (tones_folder / one["audio"]).read_bytes(), "path": f"{number}.wav"},
            "text": one["text"],
            "language": "fr" if number in (0, 7) else one["language"],
        }
        for number in range(9)
        for one in [lines[number % 2]]
    ]
    for shard in range(3):
        part = Dataset.from_list(rows[3 * shard : 3 * shard + 3])
        part.to_parquet(folder / "data" / f"train-{shard:05d}-of-00003.parquet")
    return folder


@pytest.fixture(scope="module")
def options(fit_options, corpus):
    more = {"data": str(corpus / "data"), "test": str(corpus / "test.jsonl"), "steps": 10}
    data = {"streaming": True, "shuffle_buffer": 2, "on_bad_row": "skip", "batch_size": 3}
    return {**fit_options, **more, **data, "backward": fit_options["backward"][:1]}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, options):
    """The run that was never interrupted."""
    torch.set_num_threads(1)
    listener = Crashing()
    return fit(
        FitConfig(**options), tmp_path_factory.mktemp("runs") / "straight", progress=listener
    ), listener


def test_a_stream_is_fitted_and_its_bad_rows_are_listed(straight):
    run, listener = straight
    assert [step.step for step in run.history] == list(range(1, 11))
    assert "new_domain" in run.metrics and listener.known == [(2, None)]
    about = json.loads((run.output / "run.json").read_text())
    assert (about["training_tokens"], about["temperature"]) == (None, None)
    assert about["language"] == "de-en"
    listed = [json.loads(line) for line in (run.output / SKIPPED).read_text().splitlines()]
    assert sorted(row["origin"].rpartition(" ")[2] for row in listed) == ["'0.wav'", "'7.wav'"]
    *_, bad, worth_a_look = listener.notes  # the last after the fit, of what it has read
    assert bad.startswith(f"bad rows left out: 2 of {run.config.data[0]} train")
    told = f"text that is in another set too: 7 of {run.config.data[0]} train; the first: "
    assert worth_a_look.startswith(f"rows worth a look: {told}")


def test_a_resumed_one_is_that_of_a_fit_never_interrupted(straight, options, tmp_path):
    run, _ = straight
    folder = tmp_path / "run"
    for at in (4, 9):  # in the second epoch, and in the fourth
        with pytest.raises(Crash):
            fit(
                FitConfig(**options), folder, resume=True, checkpoint_every=3, progress=Crashing(at)
            )
    path = folder / FILE
    content = path.read_bytes()
    kept = from_bytes(content)
    (place,) = kept.about["places"]
    assert place["epoch"] > 0
    write_checkpoint(path, replace(kept, about={**kept.about, "places": [place, place]}))
    with pytest.raises(UserError, match="of a stream in 2 processes, and now there are 1; start 2"):
        fit(output=folder, resume=True)
    path.write_bytes(content)
    listener = Crashing()
    resumed = fit(output=folder, resume=True, progress=listener)
    assert listener.steps[-1] == 10 and listener.steps[0] > 4
    assert resumed.history == run.history
    assert resumed.metrics == run.metrics
    one, two = (load_file(path / "posterior.safetensors") for path in (folder, run.output))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    lines = [sorted((path / SKIPPED).read_text().splitlines()) for path in (folder, run.output)]
    assert lines[0] == lines[1]


def test_a_row_that_breaks_a_later_step_ends_the_fit_in_one_line(options):
    with pytest.raises(UserError, match=r"the row with '[07]\.wav': the tokenizer does not know"):
        fit(FitConfig(**{**options, "on_bad_row": "stop"}), evaluate=False)


def test_an_object_of_datasets_is_streamed(options, tones_folder):
    def endless():
        while True:
            yield from rows

    lines = [json.loads(line) for line in (tones_folder / "train.jsonl").read_text().splitlines()]
    rows = [{**one, "audio": str(tones_folder / one["audio"])} for one in lines]
    data = IterableDataset.from_generator(endless)  # of no end, as no other source could be
    run = fit(FitConfig(**{**options, "data": data, "steps": 3}), evaluate=False)
    assert len(run.history) == 3


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": "auto"}, "beta is auto, which streaming can't take; give a number, or fit with"),
        ({"epochs": 3.0}, "epochs is 3.0, which streaming can't take; give steps"),
        ({"data": ("a", "b")}, "data is 2 sources, and streaming takes one; give one"),
        ({"data_weights": (1.0,)}, "data_weights is .* leave it out"),
        ({"max_utterances": 5}, "max_utterances is 5"),
        ({"distillation": 0.1, "distillation_languages": ("en",)}, r"distillation is 0\.1"),
        ({"cache_encoder": True}, r"cache_encoder is True"),
        ({"streaming": False, "shuffle_buffer": 5}, "shuffle_buffer is 5, but no streaming; give"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0; give a whole number from 1"),
    ],
)
def test_what_a_stream_can_not_do_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**{"streaming": True, **given})


def test_the_buffer_is_worked_out():
    assert FitConfig(streaming=True).resolved(None, None).shuffle_buffer == 1000
    assert FitConfig().resolved(10, 10).shuffle_buffer is None
