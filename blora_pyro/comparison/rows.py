"""Rows: what one fit gives on one domain, as counts of every utterance, in files of their own.

A row's file is named by a hash of all that decides it, so that a comparison which is started again,
with other methods or seeds, takes what is there and makes what is not. What is on disk are edits
and lengths of every utterance: any interval can be computed later without fitting again.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.methods import Setting
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation
from blora_pyro.files import replace_file
from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import macro_rate
from blora_pyro.runs.outcomes import NEW_DOMAIN

FORMAT = 1  # of a row; raised, all rows are made again
DEV, TEST = "dev", "test"
PIER = "pier"


def hash_of(content: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that change with JSON content, however it is ordered."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RowSpec:
    """Which row: a candidate, fitted in a setting to a domain with a seed, scored on a split.

    Attributes:
        candidate: A method at a value of its knob.
        setting: Utterances and steps.
        domain: Name of the new domain.
        seed: Of the fit.
        split: `DEV` or `TEST`, of the domain and of the backward sets.
    """

    candidate: Candidate
    setting: Setting
    domain: str
    seed: int
    split: str

    @property
    def title(self) -> str:
        """In one line."""
        method, setting = self.candidate.text, self.setting.name
        return f"{method}, {setting}, {self.domain}, seed {self.seed}, {self.split}"


@dataclass(frozen=True)
class Row:
    """What a file holds.

    Attributes:
        about: The content of the file but the counts: what the row is, sparsity, the adapter's
            size, seconds, threads, machine.
        metrics: Set -> its main measure, `wer`, `mer` or `cer`.
        counts: Set -> measure, the main one or `pier` -> edit counts per utterance.
    """

    about: Mapping[str, Any]
    metrics: Mapping[str, str]
    counts: Mapping[str, Mapping[str, Counts]]

    @property
    def failed(self) -> str | None:
        """Why there are no counts: the fit's loss was not finite."""
        return self.about.get("failed")

    def main(self, name: str) -> Counts:
        """Counts of a set's main measure."""
        return self.counts[name][self.metrics[name]]

    @property
    def backward_sets(self) -> list[str]:
        """Names of the held-out sets."""
        return [name for name in self.counts if name != NEW_DOMAIN]

    @property
    def new_domain_error(self) -> float:
        """Pooled rate of the new domain's main measure."""
        return self.main(NEW_DOMAIN).rate

    @property
    def backward_error(self) -> float:
        """Macro-average of the main measures of the backward sets."""
        return macro_rate([self.main(name) for name in self.backward_sets])

    @property
    def balanced_error(self) -> float:
        """Mean of new-domain error and backward error; infinite where the fit failed."""
        if self.failed:
            return float("inf")
        return (self.new_domain_error + self.backward_error) / 2


def counts_to_json(results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Main measure and PIER of every set, utterance by utterance."""
    return {
        name: {
            "metric": one.metric,
            **{
                measure: {"edits": counts.edits.tolist(), "lengths": counts.lengths.tolist()}
                for measure, counts in one.counts.items()
                if measure in (one.metric, PIER)
            },
        }
        for name, one in results.items()
    }


def read_row(content: Mapping[str, Any]) -> Row:
    """The row of a file's content.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If it is none.
    """
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']}")
    sets = content["sets"]
    counts = {
        name: {
            measure: Counts(np.array(both["edits"], np.int64), np.array(both["lengths"], np.int64))
            for measure, both in one.items()
            if measure != "metric"
        }
        for name, one in sets.items()
    }
    row = Row(
        {key: value for key, value in content.items() if key != "sets"},
        {name: one["metric"] for name, one in sets.items()},
        counts,
    )
    for measures in counts.values():
        if any(one.edits.shape != one.lengths.shape for one in measures.values()):
            raise ValueError("edits and lengths differ in number")
    if not row.failed and not (row.balanced_error >= 0):  # nan: a set without a word, or none
        raise ValueError("a set has no reference word")
    return row


class RowStore:
    """The rows of one output folder, and the locks by which processes share the work.

    Files are read once: a row that is there never changes.
    """

    def __init__(self, output: Path) -> None:
        """Nothing is made yet.

        Args:
            output: Folder of the comparison.
        """
        self.rows, self.locks = output / "rows", output / "locks"
        self._known: dict[str, Row] = {}

    def refresh(self) -> None:
        """Look for rows of others: files need no looking for."""

    def get(self, key: str) -> Row | None:
        """The row of a key; None if there is none, or its file is damaged (it is made again)."""
        if key not in self._known:
            try:
                self._known[key] = read_row(self._read(key))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return None
        return self._known[key]

    def _read(self, key: str) -> dict[str, Any]:
        return json.loads((self.rows / f"{key}.json").read_text(encoding="utf-8"))

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Write a row; another process sees all of it or nothing.

        Raises:
            UserError: If it can't be written.
        """
        text = json.dumps({"format": FORMAT, **content}, ensure_ascii=False) + "\n"
        with self._writing():
            self.rows.mkdir(parents=True, exist_ok=True)
            replace_file(self.rows / f"{key}.json", text.encode())

    @contextmanager
    def locked(self, key: str) -> Iterator[bool]:
        """Whether this process has the lock `key` inside the `with`; another may have it.

        The kernel releases the lock of a process that dies.

        Raises:
            UserError: If the lock's file can't be made.
        """
        with self._writing():
            self.locks.mkdir(parents=True, exist_ok=True)
            file = (self.locks / key).open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"output '{self.rows.parent}' can't be written ({error.strerror}); put that right "
                "and start the same command again, or give another output"
            ) from None
