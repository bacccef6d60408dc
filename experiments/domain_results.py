"""The results of `domains.py`: its table (CSV), and the figures that are made from it.

A row is one adapter, scored on the sets of one split: its error rates, and the edits of every
utterance (see `blora_pyro.studies.results`). Every figure is worked out for the utterances as they
are and for 1000 resamplings, in each of which all rows see the same utterances of a set; averages
are over the rows of a seed (its orders, or its domains), then over seeds.
"""

import csv
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blora_pyro.files import replace_file
from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import FloatArray, macro_rate, paired_rates, percentile_interval
from blora_pyro.studies.results import decode_counts, encode_counts
from blora_pyro.tables import Column, Percent, Table

BASE = "base"
ABOUT = ("method", "knobs", "order", "seed", "split")
DRAWS = 1000
NEW, BACKWARD = "new_domain", "backward"
AFTER_FIRST, AFTER_LAST = "first_domain_after_first", "first_domain_after_last"

Knobs = Mapping[str, float]
Curves = Mapping[int, FloatArray]  # seed -> a figure, observed and resampled, (1 + DRAWS,)


def shown(knobs: Knobs) -> str:
    """Return knobs as text: `lr 0.002, ewc 1000`."""
    return ", ".join(f"{name} {value:g}" for name, value in knobs.items())


@dataclass(frozen=True)
class Row:
    """One adapter on every set.

    Attributes:
        method: Of the study file.
        knobs: Of the method, see `shown`.
        order: The domains that it was fitted to, one after the other; empty for all together.
        seed: Of the fits.
        split: `dev` or `test`.
        domains: The domains of the study; the other sets are backward sets.
        counts: Set -> edits and lengths of its main measure. `DOMAIN (shared)` is a domain scored
            with what all domains share.
        measures: Set -> `wer`, `mer` or `cer`.
        origin: `command`, `commit` and `machine`.
    """

    method: str
    knobs: str
    order: tuple[str, ...]
    seed: int
    split: str
    domains: tuple[str, ...]
    counts: dict[str, Counts]
    measures: dict[str, str]
    origin: dict[str, str]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the other rows, and orders the table."""
        return self.method, self.knobs, self.order, self.split, self.seed

    @property
    def backward(self) -> list[str]:
        """Names of the backward sets."""
        return [name for name in self.counts if name.partition(" ")[0] not in self.domains]

    @property
    def errors(self) -> tuple[float, float]:
        """Mean error of the domains, and of the backward sets."""
        new, old = (
            macro_rate([self.counts[one] for one in names])
            for names in (self.domains, self.backward)
        )
        return new, old

    @property
    def balanced_error(self) -> float:
        """Mean of the two `errors`."""
        return sum(self.errors) / 2


def read_rows(path: Path, domains: Sequence[str]) -> list[Row]:
    """Return the rows of a table; [] if there is no such file."""
    if not path.is_file():
        return []
    found, lengths = [], dict[tuple[str, str], Any]()
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            counts, measures = {}, {}
            for column, text in line.items():
                kind, _, name = column.partition(".")
                if kind == "lengths" and text:
                    lengths[line["split"], name] = decode_counts(text)
                elif kind == "edits" and text:
                    measures[name], _, edits = text.partition(":")
                    known = lengths[line["split"], name.partition(" ")[0]]
                    counts[name] = Counts(decode_counts(edits), known)
            origin = {name: line[name] for name in ("command", "commit", "machine")}
            order, seed = tuple(line["order"].split()), int(line["seed"])
            about = line["method"], line["knobs"], order, seed, line["split"]
            found.append(Row(*about, tuple(domains), counts, measures, origin))
    return found


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the table; lengths stand in the first row of a split."""
    ordered = sorted(rows, key=lambda row: row.key)
    sets = list(dict.fromkeys(name for row in ordered for name in row.counts))
    plain = [name for name in sets if " " not in name]
    heads = [*ABOUT, NEW, BACKWARD, "command", "commit", "machine"]
    heads += [f"lengths.{name}" for name in plain] + [f"edits.{name}" for name in sets]
    lines, known = [], set[tuple[str, str]]()
    for row in ordered:
        new, old = row.errors
        line = {name: getattr(row, name) for name in ABOUT} | {"order": " ".join(row.order)}
        line |= {NEW: f"{new:.6f}", BACKWARD: f"{old:.6f}", **row.origin}
        for name, counts in row.counts.items():
            line[f"edits.{name}"] = f"{row.measures[name]}:{encode_counts(counts.edits)}"
            if name in plain and (row.split, name) not in known:
                known.add((row.split, name))
                line[f"lengths.{name}"] = encode_counts(counts.lengths)
        lines.append(line)
    fresh = path.with_suffix(".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, heads, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    replace_file(path, fresh.read_bytes())
    fresh.unlink()


class Figures:
    """All rows of the test sets, resampled together."""

    def __init__(self, rows: Iterable[Row], methods: Mapping[str, Mapping[str, Any]]) -> None:
        """Resample.

        Args:
            rows: Those of the dev sets are left out.
            methods: Of the study file.
        """
        self.rows = [row for row in rows if row.split == "test"]
        self.methods = methods
        systems: dict[str, list[tuple[int, str, Counts]]] = {}
        for place, row in enumerate(self.rows):
            for name, counts in row.counts.items():
                systems.setdefault(name.partition(" ")[0], []).append((place, name, counts))
        self._rates: dict[tuple[int, str], FloatArray] = {}
        for name, seen in systems.items():
            rates = paired_rates([one[-1] for one in seen], DRAWS, zlib.crc32(name.encode()))
            self._rates |= {(at, own): rate for (at, own, _), rate in zip(seen, rates, strict=True)}

    def curves(self, method: str, figure: str) -> dict[int, FloatArray]:
        """Return a figure of each seed, averaged over the rows of the seed.

        Figures of the first domain are of the rows whose first fit has been scored, too.
        """
        found: dict[int, list[FloatArray]] = {}
        is_alone = self.methods[method]["kind"] == "alone"
        for place, row in enumerate(self.rows):
            if row.method != method:
                continue
            at: int | None = place
            if figure in (AFTER_FIRST, AFTER_LAST):
                first = self._first(row)
                at = first if figure == AFTER_FIRST or first is None else place
                names: Sequence[str] = row.order[:1]
            elif figure == NEW:
                names = row.order if is_alone else row.domains
            else:
                names = row.backward
            if at is not None:
                own = np.mean([self._rates[at, name] for name in names], axis=0)
                found.setdefault(row.seed, []).append(own)
        return {seed: np.mean(own, axis=0) for seed, own in found.items()}

    def _first(self, row: Row) -> int | None:
        """Return the place of the row of a sequence's first fit; None if it is not there."""
        wanted = self.methods[row.method]["options"], row.order[:1], row.seed
        rows = enumerate((one.method, one.order, one.seed) for one in self.rows)
        return next((place for place, one in rows if one == wanted), None)

    def summary(self, method: str) -> dict[str, Percent]:
        """Return every figure of a method."""
        wanted = [NEW, BACKWARD]
        if self.methods[method]["kind"] in ("sequence", "chain"):
            wanted += [AFTER_FIRST, AFTER_LAST]
        curves = {figure: self.curves(method, figure) for figure in wanted}
        found = {figure: estimate(curve) for figure, curve in curves.items() if curve}
        if curves.get(AFTER_LAST):
            first, last = curves[AFTER_FIRST], curves[AFTER_LAST]
            (base,) = self.curves(BASE, NEW).values()  # the base has no seed
            found["rise"] = estimate(combined(lambda a, b: b / a - 1, first, last))
            found["kept"] = estimate(combined(lambda a, b: (base - b) / (base - a), first, last))
        return found

    def difference(self, method: str, other: str, figure: str) -> Percent:
        """Return by how much a figure of one method is above that of another, paired."""
        own, theirs = self.curves(method, figure), self.curves(other, figure)
        if other == BASE:  # it has no seed
            theirs = dict.fromkeys(own, *theirs.values())
        found = estimate(combined(lambda a, b: a - b, own, theirs))
        return replace(found, signed=True)


def estimate(curves: Curves) -> Percent:
    """Return the value, its interval over utterances, and the standard deviation over seeds."""
    curve = np.mean([*curves.values()], axis=0)
    own = [float(one[0]) for one in curves.values()]
    stddev = float(np.std(own, ddof=1)) if len(own) > 1 else None
    return Percent(float(curve[0]), percentile_interval(curve[1:]), stddev)


def combined(formula: Callable[..., FloatArray], *parts: Curves) -> dict[int, FloatArray]:
    """Return a formula of the averages of the seeds that all parts have."""
    seeds = set.intersection(*(set(one) for one in parts))
    return {seed: formula(*(one[seed] for one in parts)) for seed in sorted(seeds)}


def results_table(rows: Sequence[Row], methods: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of docs/domains.md: a row for each method that was scored."""
    figures = Figures(rows, methods)
    knobs = {row.method: row.knobs for row in figures.rows}
    heads = ("method", "knobs, chosen on dev", "new domains, mean", BACKWARD)
    more = ("first domain, after it → after the last", "rise", "of its gain kept")
    table = Table([Column(head) for head in (*heads, *more)])
    for method in (one for one in methods if one in knobs):
        found = figures.summary(method)
        first, last = found.get(AFTER_FIRST), found.get(AFTER_LAST)
        after = ""
        if first and last and first.share is not None and last.share is not None:
            after = f"{100 * first.share:.1f} → {100 * last.share:.1f}"
        shares = [whole(found[name]) if name in found else "" for name in ("rise", "kept")]
        cells = methods[method]["title"], knobs[method], found[NEW], found[BACKWARD]
        table.add_row(*cells, after, *shares)
    return table


def whole(one: Percent) -> str:
    """Return a share without decimals: `21% ±4 [15, 28]`."""
    assert one.share is not None and one.stddev is not None and one.interval is not None
    low, high = (f"{100 * end:.0f}" for end in one.interval if end is not None)
    return f"{100 * one.share:.0f}% ±{100 * one.stddev:.0f} [{low}, {high}]"
