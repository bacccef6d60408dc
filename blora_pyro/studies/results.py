"""The results of a study as one table (CSV): a row for each scored fit.

A row names the fit (`base`, `setting`, `method`, `candidate`, `data`, `seed`) and the `split` that
it was scored on, and holds error rates, edit counts of every utterance, and where it was made
(`command`, `commit`, `machine`). The columns after those of `COLUMNS` come in pairs, one for each
set and measure: `edits.SET` with `lengths.SET` for the set's main measure, `edits.SET.pier` with
`lengths.SET.pier` for PIER. So every interval can be computed again from the table alone.

Counts are written a character for each utterance, in the set's order: 0-9, a-z for 10 to 35, and
larger ones in parentheses. Before the counts of a main measure stands its name: `mer:2041(36)0`.
`lengths` are the reference's tokens; they are blank where they are those of the row above with the
same data and split, so that they stand in the table about once.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from blora_pyro.errors import UserError
from blora_pyro.files import read_json, replace_file
from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import macro_rate
from blora_pyro.runs.folders import UTTERANCES
from blora_pyro.runs.record import METRICS, RUN
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.runs.utterances import PIER, counts_of_utterances, read_utterances
from blora_pyro.studies.methods import BASE
from blora_pyro.transcription.safeguards import is_loop

DEV, TEST = "dev", "test"
PARTS = ("A", "B", "delta_w")  # of an adapter, whose sparsity is told
COLUMNS = (
    *("base", "setting", "method", "candidate", "data", "seed", "split", "failed"),
    *("new_domain", "pier", "backward", "sparsity_A", "sparsity_B", "sparsity_delta_w"),
    *("weights", "bytes", "seconds", "run", "after", "command", "commit", "machine"),
    *("base_hash", "loops"),
)
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

Key = tuple[str, str, str, str, int, str]


@dataclass(frozen=True)
class ScoredFit:
    """A fit, or the base model, scored on one split of one data set and of the backward sets.

    Attributes:
        base: Label of the base model.
        setting: Name of the setting.
        method: Name of the method; `base` is the base model as it is.
        candidate: METHOD:VALUE, then the values of the methods that it builds on, with colons
            between: `scaled-lora:0.5:0.003`.
        data: Name of the data set, the new domain.
        seed: Of the fit.
        split: `dev` or `test`.
        metrics: Set -> its main measure, `wer`, `mer` or `cer`; `new_domain` first.
        counts: Set -> measure, the main one or `pier` -> edit counts of every utterance.
        failed: Why there are no counts: the loss was not finite; "" otherwise.
        sparsity: `A`, `B`, `delta_w` -> share of elements below 1e-3 in magnitude; None if unknown.
        weights: Number of weights of the adapter.
        bytes: Size of its file.
        seconds: Duration of the fit.
        run: Name of the run folder, "" if there is none.
        after: The step after the fit, such as "strength 0.5"; "" for none.
        command: The `blora-pyro fit` that makes the fit.
        commit: Of the code.
        machine: Processor, threads and versions.
        base_hash: Of the weights of the base model; "" if unknown.
        loops: Number of transcripts that repeat themselves, of all sets.
    """

    base: str
    setting: str
    method: str
    candidate: str
    data: str
    seed: int
    split: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, Counts]] = field(default_factory=dict)
    failed: str = ""
    sparsity: Mapping[str, float | None] = field(default_factory=dict)
    weights: int = 0
    bytes: int = 0
    seconds: float = 0.0
    run: str = ""
    after: str = ""
    command: str = ""
    commit: str = ""
    machine: str = ""
    base_hash: str = ""
    loops: int = 0

    @property
    def key(self) -> Key:
        """What tells it from the other rows; the base model has neither setting nor seed."""
        is_base = self.method == BASE
        setting, seed = ("", 0) if is_base else (self.setting, self.seed)
        return self.base, setting, self.candidate, self.data, seed, self.split

    def main(self, name: str) -> Counts:
        """Counts of a set's main measure."""
        return self.counts[name][self.metrics[name]]

    @property
    def backward_sets(self) -> list[str]:
        """Names of the backward sets."""
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

    # ---- as a row of the table

    def to_row(self) -> dict[str, str]:
        """Return the row as texts by column, lengths and all."""
        row = {name: str(getattr(self, name, "")) for name in COLUMNS}
        row |= {name: str(getattr(self, name) or "") for name in ("weights", "bytes", "loops")}
        row |= {"seconds": f"{self.seconds:.6g}" if self.seconds else ""}
        for part in PARTS:
            share = self.sparsity.get(part)
            row[f"sparsity_{part}"] = "" if share is None else f"{share:.6g}"
        if self.counts:
            pier = self.counts[NEW_DOMAIN].get(PIER)
            row["new_domain"] = f"{self.new_domain_error:.6f}"
            row["pier"] = "" if pier is None else f"{pier.rate:.6f}"
            row["backward"] = f"{self.backward_error:.6f}"
        for name, measures in self.counts.items():
            for measure, counts in measures.items():
                column, prefix = (
                    (f"{name}.{PIER}", "") if measure == PIER else (name, f"{measure}:")
                )
                row[f"edits.{column}"] = prefix + encode_counts(counts.edits)
                row[f"lengths.{column}"] = encode_counts(counts.lengths)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> "ScoredFit":
        """Return what a row holds, its lengths filled in; KeyError or ValueError if damaged."""
        metrics: dict[str, str] = {}
        counts: dict[str, dict[str, Counts]] = {}
        for column in (one for one, text in row.items() if one.startswith("edits.") and text):
            name, text = column.removeprefix("edits."), row[column]
            lengths, measure = decode_counts(row[f"lengths.{name}"]), PIER
            if name.endswith(f".{PIER}"):
                name = name.removesuffix(f".{PIER}")
            else:
                measure, _, text = text.partition(":")
                metrics[name] = measure
            edits = decode_counts(text)
            if edits.shape != lengths.shape:
                raise ValueError(
                    f"{column} has {len(edits)} utterances, its lengths {len(lengths)}"
                )
            counts.setdefault(name, {})[measure] = Counts(edits, lengths)
        row = {"base_hash": "", "loops": "", **row}  # earlier tables have none
        shares = {part: row[f"sparsity_{part}"] for part in PARTS}
        scored = cls(
            **{one.name: row[one.name] for one in fields(cls) if one.type is str},
            seed=int(row["seed"]),
            metrics=metrics,
            counts=counts,
            sparsity={part: float(text) if text else None for part, text in shares.items()},
            weights=int(row["weights"] or 0),
            bytes=int(row["bytes"] or 0),
            loops=int(row["loops"] or 0),
            seconds=float(row["seconds"] or 0),
        )
        if not scored.failed and not scored.balanced_error >= 0:  # nan: no words in a set
            raise ValueError("a set has no reference word")
        return scored


def encode_counts(counts: Iterable[int]) -> str:
    """Return counts as text, a character each; larger ones than 35 as a number in parentheses."""
    return "".join(DIGITS[one] if one < len(DIGITS) else f"({one})" for one in counts)


def decode_counts(text: str) -> np.ndarray:
    """Return the counts of a text of `encode_counts`; ValueError if it is none."""
    parts = re.findall(r"(?s)\((\d+)\)|(.)", text)
    found = [int(number or DIGITS.index(digit)) for number, digit in parts]
    return np.array(found, np.int64)


# ---- the file


def results_frame(scored: Iterable[ScoredFit]) -> pandas.DataFrame:
    """Return the table of scored fits, all cells texts, in an order that does not hang on theirs.

    Of two with the same key, the last counts.
    """
    unique = {one.key: one for one in scored}
    order = sorted(unique.values(), key=_order)
    frame = pandas.DataFrame([one.to_row() for one in order]).fillna("")
    counts = [name for name in frame.columns if name not in COLUMNS]
    frame = frame.reindex(columns=[*COLUMNS, *counts])
    for name in (one for one in counts if one.startswith("lengths.")):
        above = frame[name].where(frame[name] != "").groupby([frame["data"], frame["split"]])
        above = above.transform(lambda column: column.ffill().shift())
        frame[name] = frame[name].where(frame[name] != above, "")
    return frame


def _order(one: ScoredFit) -> tuple[Any, ...]:
    values = [_as_number(text) for text in one.candidate.split(":")[1:]]
    return one.base, one.setting, one.method, values, one.split, one.data, one.seed


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def write_results(path: Path, scored: Iterable[ScoredFit]) -> None:
    """Write the table; a reader sees the old one or the new one, never half of it."""
    text = results_frame(scored).to_csv(index=False, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), shared=True)
    except OSError as error:
        raise UserError(
            f"'{path}' can't be written ({error.strerror}); put that right and start the same "
            "command again: no fit is lost"
        ) from None


def read_results(path: Path) -> list[ScoredFit]:
    """Return the scored fits of a table, [] if there is none; refuse damage, naming the line."""
    if not path.exists():
        return []
    line = 1
    found = []
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
        lengths = [name for name in frame.columns if name.startswith("lengths.")]
        if lengths:
            known = frame[lengths].where(frame[lengths] != "")
            frame[lengths] = known.groupby([frame["data"], frame["split"]]).ffill().fillna("")
        for row in frame.to_dict("records"):
            line += 1
            found.append(ScoredFit.from_row({str(name): text for name, text in row.items()}))
    except (OSError, KeyError, ValueError) as error:  # pandas' own are ValueErrors
        raise UserError(
            f"{path}, line {line}: no table of results ({type(error).__name__}: {error}); bring "
            "back a copy, or remove it"
        ) from None
    return found


# ---- from the files of a run folder


def score_files(folder: Path, split: str = TEST, after: str = "") -> tuple[Path, Path]:
    """Return where a run folder keeps the metrics and utterances of a split.

    The test set's are `metrics.json` and `utterances.jsonl`, others `metrics-dev.json` or
    `metrics-test-strength-0.5.json`.
    """
    parts = [split, after.replace(" ", "-")] if after else [] if split == TEST else [split]
    metrics, utterances = (
        folder / "-".join([Path(name).stem, *parts]) for name in (METRICS, UTTERANCES)
    )
    return Path(f"{metrics}{Path(METRICS).suffix}"), Path(f"{utterances}{Path(UTTERANCES).suffix}")


def scored_run(scored: ScoredFit, folder: Path) -> ScoredFit:
    """Return a scored fit with what its run folder holds of its split: rates, sparsity, seconds.

    Any program that leaves `metrics.json` and `utterances.jsonl` in a folder, and `seconds` in its
    `run.json`, can be a row of a table.
    """
    metrics_file, utterances_file = score_files(folder, scored.split, scored.after)
    state = BASE if scored.method == BASE else "adapted"
    try:
        rows = [row for row in read_utterances(utterances_file) if row["state"] == state]
        metrics, counts = counts_of_utterances(rows, state)
        loops = sum(is_loop(row.get("raw", row)["hypothesis"]) for row in rows)
        sparsity = read_json(metrics_file).get("sparsity") or {}
        run = folder / RUN
        about = read_json(run) if run.exists() else {}
        seconds = float(about.get("seconds", {}).get("fit", 0.0))
        found: dict[str, Any] = {
            "metrics": metrics,
            "counts": counts,
            "sparsity": sparsity,
            "loops": loops,
        }
        return replace(scored, seconds=seconds, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{metrics_file} or {utterances_file.name} is damaged ({error}); remove them"
        ) from None
