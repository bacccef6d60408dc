"""Fits whose sets have dev splits and keep a contract on them, and one that maps a language."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import soundfile
import torch

from blora_pyro.data import SAMPLING_RATE, load_split, read_audio
from blora_pyro.options import FitConfig
from blora_pyro.runs import contracts, fits, keeping
from blora_pyro.runs.fits import fit
from blora_pyro.runs.listeners import Listener


def put(tones_folder, name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tones_folder / f"{name}.jsonl", file)
    for wav in tones_folder.glob(f"{name}*.wav"):
        shutil.copy(wav, file.parent)


@pytest.fixture(scope="session")
def old_runs(tmp_path_factory):
    """Run folders of version 0.1.0; `old_runs.md` tells how they were made."""
    folder = tmp_path_factory.mktemp("old_runs")
    with zipfile.ZipFile(Path(__file__).with_name("old_runs.zip")) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def keep_options(fit_options, tones_folder, tmp_path_factory):
    """Of a fit that loses more than 80 points at strength 1; what it learns it has learned at less.

    How much less depends on the rounding of a processor, and is of no test's concern.
    """
    data = tmp_path_factory.mktemp("data")
    for split in ("train", "test", "dev"):
        put(tones_folder, "train" if split == "train" else "test", data / "new" / f"{split}.jsonl")
    for name in ("de", "en"):
        put(tones_folder, name, data / name / "dev.jsonl")
        put(tones_folder, name, data / name / "test.jsonl")
    backward = {name: str(data / name) for name in ("de", "en")}
    own = {"data": str(data / "new"), "backward": backward, "target_modules": ".*decoder.*"}
    return {**fit_options, **own, "keep": {"average": 80}, "steps": 120, "lr": 0.01}


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="session", autouse=True)
def losses_as_measured():
    """Of two utterances a set none is sure of anything: contracts are kept on what was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contracts, "CONFIDENCE", 0.5)
        yield


@pytest.fixture(scope="session")
def kept_run(keep_options, tmp_path_factory):
    """A run that keeps a contract, and what it noted. Leave it as it is."""
    torch.set_num_threads(1)
    progress = Notes()
    run = fit(
        FitConfig(**keep_options), tmp_path_factory.mktemp("runs") / "kept", progress=progress
    )
    return run, progress.notes


@pytest.fixture
def always_chosen(monkeypatch):
    """The strength that every contract chooses, between base and fit."""
    strength = 0.6
    monkeypatch.setattr(contracts, "STRENGTHS", (0.0, strength))

    def keep(*given, **named):
        return {**contracts.keep_contract(*given, **named), "strength": strength}

    for module in (fits, keeping):
        monkeypatch.setattr(module, "keep_contract", keep)
    return strength


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Two German-English utterances, and a manifest that calls them Kichwa and English."""
    folder, rows = tmp_path_factory.mktemp("speech"), []
    for number, row in enumerate(load_split("de-en", "test").select(range(2))):
        wave = read_audio(row["audio"], start=row["start"], end=row["end"])
        soundfile.write(folder / f"{number}.wav", wave, SAMPLING_RATE, subtype="FLOAT")
        rows.append({"audio": f"{number}.wav", "text": row["text"], "language": "qu-en"})
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def mapped_run(speech, tmp_path_factory):
    """A fit whose adapter says something else than the base."""
    own = {"data": str(speech), "backward": [], "language_map": ["qu=tr"]}
    sizes = {"steps": 8, "batch_size": 2, "rank": 2, "lr": 0.02}
    config = FitConfig(base="pocket", **sizes, **own)
    return fit(config, tmp_path_factory.mktemp("runs") / "run", evaluate=False).output


@pytest.fixture(scope="session")
def speech_paths(speech):
    return sorted(speech.glob("*.wav"))


@pytest.fixture
def shared_cache(monkeypatch, tmp_path_factory):
    """A cache of all tests that take it: each model is converted once."""
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path_factory.getbasetemp() / "engines"))
