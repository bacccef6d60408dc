"""Made-up scores, errors as wanted, and small sets of tones for real fits."""

import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blora_pyro.runs.listeners import Listener

LENGTH = 10  # tokens of an utterance


class Stages(Listener):
    """What was begun; a signal comes in at `signal_at`, a part of a stage's name."""

    def __init__(self, signal_at=None):
        self.seen, self.signal_at = [], signal_at

    def stage(self, name):
        self.seen.append(name)
        if self.signal_at and self.signal_at in name:
            os.kill(os.getpid(), signal.SIGTERM)


def made_up_counts(rate: float, n: int, seed: int):
    """`n` utterances with edits that pool to `rate`, as near as can be."""
    from blora_pyro.metrics import Counts

    total = round(rate * LENGTH * n)
    rng = np.random.default_rng(seed)
    edits = np.bincount(rng.integers(n, size=total), minlength=n)
    return Counts(edits, np.full(n, LENGTH))


def made_up(names, new_domain: float, backward: Any, seed: int = 0, n: int = 20, **about: Any):
    """A score of errors as given, of the backward sets de and en or of those of a mapping."""
    from dataclasses import replace

    from blora_pyro.studies.results import ScoredFit

    sets = backward if isinstance(backward, dict) else {"de": backward, "en": backward}
    errors = {"new_domain": new_domain, **sets}
    counts = {
        name: {"wer": made_up_counts(rate, n, seed + place)}
        for place, (name, rate) in enumerate(errors.items())
    }
    counts["new_domain"]["pier"] = made_up_counts(new_domain, n, seed + 100)
    known = {"sparsity": {"A": 0.1, "B": 0.2, "delta_w": 0.3}, "weights": 1000, "bytes": 4096}
    scored = names if isinstance(names, ScoredFit) else ScoredFit(*names)
    metrics = dict.fromkeys(counts, "wer")
    about = {"seconds": 60.0, **known, **about}
    return replace(scored, metrics=metrics, counts=counts, **about)


def world(spec) -> tuple[float, dict[str, float]]:
    """Errors that a method might have: (new domain, backward by set)."""
    from blora_pyro.studies.methods import built_in_methods

    method, value = spec.candidate.method, spec.candidate.value
    if method.name == "base":
        return 0.45, {"de": 0.05, "en": 0.08}
    force = (method.values.index(value) + 1) / len(method.values)
    kind = [*built_in_methods()].index(method.name)
    rng = np.random.default_rng([kind, spec.seed, len(spec.data)])
    new = 0.12 + 0.2 * (1 - force) ** 2 + 0.002 * kind + 0.01 * rng.random()
    back = 0.06 + 0.25 * force**2 / (1 + 0.2 * kind) + 0.01 * rng.random()
    return new, {"de": back, "en": back + 0.02}


@pytest.fixture
def made_up_run(tmp_path, sets_folder):
    """A function that makes a study whose scores are there already, all made up."""
    from blora_pyro.studies.results import write_results
    from blora_pyro.studies.running import StudyRun
    from blora_pyro.studies.study_file import short_study

    def make(methods=None, settings=("allx600", "allx400"), fill=True, **options: Any):
        data = {name: str(sets_folder / "mix") for name in ("de-en", "es-en")}
        backward = {name: str(sets_folder / name) for name in ("de", "en")}
        study = short_study(
            methods=methods,
            data=data,
            seeds=(0, 1),
            settings=settings,
            options={"base": "pocket", "backward": backward},
            **options,
        )
        run = StudyRun(study, tmp_path / "out", tmp_path / "out" / "results.csv")
        run.refresh()
        while fill and (missing := run.plan.missing()):
            for spec in missing:
                new, back = world(spec)
                shift = 100 * [*data].index(spec.data)
                run.scores[spec.key] = made_up(spec.scored, new, back, seed=shift)
        if run.scores:
            write_results(run.results, run.scores.values())
        return run

    return make


@pytest.fixture(scope="session")
def sets_folder(tones_folder, tmp_path_factory) -> Path:
    """`mix`, `de` and `en`: a folder each with train, dev and test, of the tones."""
    folder = tmp_path_factory.mktemp("sets")
    manifests = {
        "mix": {"train": "train", "dev": "test", "test": "test"},
        **{name: dict.fromkeys(("train", "dev", "test"), name) for name in ("de", "en")},
    }
    for name, splits in manifests.items():
        (folder / name).mkdir()
        for split, file in splits.items():
            lines = (tones_folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            rows = [{**row, "audio": str(tones_folder / row["audio"])} for row in rows]
            text = "\n".join(json.dumps(row) for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


STUDY = """
data = {{ mix = "{sets}/mix" }}
backward = {{ de = "{sets}/de", en = "{sets}/en" }}
bases = {{ fluent = "{base}" }}
seeds = [0]
methods = ["lora", "scaled-lora", "blora"]

[options]
rank = 2
batch_size = 2
steps = 2

[method.lora]
title = "LoRA"
knob = "lr"
values = [0.01, 0.03]
options = {{ guide = "point", beta = 0.0 }}

[method.scaled-lora]
title = "LoRA, scaled"
of = "lora"
knob = "strength"
values = [0.0, 0.5]

[method.blora]
title = "BLoRA"
family = "bayes"
knob = "beta"
values = [1e-5]
options = {{ lr = 0.03 }}
"""


@pytest.fixture
def study_file(fluent_folder, sets_folder, tmp_path) -> Path:
    """A study of fits of two steps: 4 scores on dev, then 5 on test and more."""
    path = tmp_path / "small.toml"
    path.write_text(STUDY.format(sets=sets_folder, base=fluent_folder), encoding="utf-8")
    return path


@pytest.fixture
def study(study_file):
    """The study of the file."""
    from blora_pyro.studies.study_file import read_study_file, study_of

    return study_of(read_study_file(study_file), "small.toml")


def no_heartbeat_for_an_hour(database: Path) -> None:
    """Let all trials of a database miss their heartbeats."""
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    connection.close()
