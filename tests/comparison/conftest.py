"""Made-up rows: errors as wanted, in files as a comparison leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.comparing import Comparison
from blora_pyro.comparison.methods import METHODS, choose_methods, read_setting
from blora_pyro.comparison.plan import Plan
from blora_pyro.comparison.rows import FORMAT, RowSpec, read_row
from blora_pyro.comparison.study import Study
from blora_pyro.runs.listeners import Listener

LENGTH = 10  # tokens of an utterance


def counts(rate: float, n: int, seed: int) -> dict[str, list[int]]:
    """`n` utterances with edits that pool to `rate`, as near as can be."""
    total = round(rate * LENGTH * n)
    rng = np.random.default_rng(seed)
    edits = np.bincount(rng.integers(n, size=total), minlength=n)
    return {"edits": edits.tolist(), "lengths": [LENGTH] * n}


def row_content(
    new_domain: float, backward: dict[str, float], n: int = 20, seed: int = 0, **about: Any
) -> dict[str, Any]:
    """The content of a row's file."""
    errors = {"new_domain": new_domain, **backward}
    sets: dict[str, Any] = {
        name: {"metric": "wer", "wer": counts(rate, n, seed + place)}
        for place, (name, rate) in enumerate(errors.items())
    }
    sets["new_domain"]["pier"] = counts(new_domain, n, seed + 100)
    return {
        "format": FORMAT,
        "sparsity": {"A": 0.1, "B": 0.2, "delta_w": 0.3},
        "adapter": {"weights": 1000, "bytes": 4096},
        "seconds": {"fit": 60.0},
        "machine": {"threads": 1},
        "sets": sets,
        **about,
    }


@pytest.fixture
def make_row():
    """A row of errors as given."""

    def make(new_domain: float, backward: float | dict[str, float], **about: Any):
        sets = backward if isinstance(backward, dict) else {"de": backward, "en": backward}
        return read_row(row_content(new_domain, sets, **about))

    return make


def world(candidate: Candidate, domain: str, seed: int) -> tuple[float, dict[str, float]]:
    """Errors that a method might have: (new domain, backward by set)."""
    names = [*METHODS]
    method, values = candidate.method, candidate.method.values
    if method.name == "base":
        return 0.45, {"de": 0.05, "en": 0.08}
    force = (values.index(candidate.value) + 1) / len(values)
    kind = names.index(method.name)
    rng = np.random.default_rng([kind, seed, len(domain)])
    new = 0.12 + 0.2 * (1 - force) ** 2 + 0.002 * kind + 0.01 * rng.random()
    back = 0.06 + 0.25 * force**2 / (1 + 0.2 * kind) + 0.01 * rng.random()
    return new, {"de": back, "en": back + 0.02}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A function that makes a comparison whose rows are there already, all made up."""

    def make(
        methods: list[str] | None = None,
        settings: tuple[str, ...] = ("allx600", "allx400"),
        fill: bool = True,
        **options: Any,
    ) -> Comparison:
        monkeypatch.setattr(Study, "fingerprint", "0123456789ab")
        domains = {"de-en": "de-en", "es-en": "es-en"}
        study = Study(tmp_path / "compare", domains, {}, Listener())
        plan = Plan(
            choose_methods(methods),
            [read_setting(one) for one in settings],
            [*domains],
            (0, 1),
            study.row_of,
            **options,
        )
        comparison = Comparison(study, plan)
        while fill and (todo := comparison.unmade()):
            for spec in todo:
                put(study, spec)
        return comparison

    return make


@pytest.fixture
def fake_rows(monkeypatch):
    """Rows are made up instead of fitted; the titles of those that were made."""
    made: list[str] = []

    def make(study: Study, spec: RowSpec) -> None:
        made.append(spec.title)
        study.store.put(study.key_of(spec), row_content(0.2, {"de": 0.1, "en": 0.1}))

    monkeypatch.setattr(Study, "make", make)
    return made


def put(study: Study, spec: RowSpec) -> None:
    """Make a row up."""
    new, backward = world(spec.candidate, spec.domain, spec.seed)
    shift = 100 * [*study.domains].index(spec.domain)
    study.store.put(study.key_of(spec), row_content(new, backward, seed=shift))


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


@pytest.fixture
def small(fluent_folder, sets_folder) -> dict[str, Any]:
    """Options of a comparison of fits of two steps."""
    return {
        "domains": {"mix": str(sets_folder / "mix")},
        "backward": {name: str(sets_folder / name) for name in ("de", "en")},
        "base": str(fluent_folder),
        "settings": ["allx2"],
        "seeds": [0],
        "rank": 2,
        "batch_size": 2,
    }
