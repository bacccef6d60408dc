"""What `domains.py` says of its rows: errors, what is kept of the first domain, and how sure it is.

Every figure is worked out for the utterances as they are and for 1000 resamplings of them, in each
of which all rows see the same utterances of a set; averages are over the rows of a seed (its
orders, or its domains), then over seeds.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import print_table

from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import FloatArray, macro_rate, paired_rates, percentile_interval

DOMAINS = ("zh-en", "de-en", "es-en")
BASE = "base"
APART = ("lora", "blora")  # an adapter for each domain
IN_SEQUENCE = {  # and its first fit
    "sequential-lora": "lora",
    "sequential-blora": "blora",
    "ewc-lora": "lora",
    "chain": "blora",
}
Knobs = Mapping[str, float]
DRAWS = 1000
NEW, BACKWARD, SHARED = "new_domain", "backward", "new_domain_shared"
AFTER_FIRST, AFTER_LAST = "first_domain_after_first", "first_domain_after_last"


@dataclass(frozen=True)
class Row:
    """Edits on every set of one adapter.

    Attributes:
        method: Of `domains.METHODS`.
        knobs: Of it; empty if it has none.
        order: The domains it was fitted to, one after the other; empty for all together.
        seed: Of the fits.
        split: Of the sets.
        counts: Set -> edits and lengths of its main measure, an utterance each.
    """

    method: str
    knobs: Knobs
    order: tuple[str, ...]
    seed: int
    split: str
    counts: Mapping[str, Counts]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Row":
        """Of a file's content."""
        counts = {
            name: Counts(
                np.array(one[one["metric"]]["edits"]), np.array(one[one["metric"]]["lengths"])
            )
            for name, one in content["sets"].items()
        }
        about = {name: content[name] for name in ("method", "knobs", "seed", "split")}
        return cls(**about, order=tuple(content["order"]), counts=counts)

    @property
    def backward(self) -> list[str]:
        """The held-out sets."""
        return [name for name in self.counts if name.partition(" ")[0] not in DOMAINS]

    @property
    def balanced_error(self) -> float:
        """Mean of the average new-domain error and the backward error."""
        new, old = (
            macro_rate([self.counts[one] for one in names]) for names in (DOMAINS, self.backward)
        )
        return (new + old) / 2


class Figures:
    """All rows of the test sets, resampled together."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Resample."""
        self.rows = list(rows)
        systems: dict[str, list[tuple[int, str, Counts]]] = {}
        for place, row in enumerate(self.rows):
            for name, counts in row.counts.items():
                systems.setdefault(name.partition(" ")[0], []).append((place, name, counts))
        self._rates: dict[tuple[int, str], FloatArray] = {}
        for name, seen in systems.items():
            rates = paired_rates([one[-1] for one in seen], DRAWS, zlib.crc32(name.encode()))
            self._rates |= {(at, own): rate for (at, own, _), rate in zip(seen, rates, strict=True)}

    def of(self, method: str, figure: str) -> dict[int, FloatArray]:
        """Seed -> the figure, observed and resampled, averaged over the rows of the seed.

        What is said of a first domain is of the rows whose first fit has been scored, too.
        """
        found: dict[int, list[FloatArray]] = {}
        for place, row in enumerate(self.rows):
            if row.method != method:
                continue
            first = self._first(row)
            if figure in (AFTER_FIRST, AFTER_LAST) and first is None:
                continue
            at = first if figure == AFTER_FIRST and first is not None else place
            curves = [self._rates[at, name] for name in self._sets(row, figure)]
            found.setdefault(row.seed, []).append(np.mean(curves, axis=0))
        return {seed: np.mean(curves, axis=0) for seed, curves in found.items()}

    def _sets(self, row: Row, figure: str) -> Sequence[str]:
        return {
            NEW: row.order if row.method in APART else DOMAINS,
            BACKWARD: row.backward,
            SHARED: [f"{domain} (shared)" for domain in DOMAINS],
            AFTER_FIRST: row.order[:1],
            AFTER_LAST: row.order[:1],
        }[figure]

    def _first(self, row: Row) -> int | None:
        """The place of the row of a sequence's first fit; None if it is not there."""
        wanted = IN_SEQUENCE.get(row.method), row.order[:1], row.seed
        rows = enumerate((one.method, one.order, one.seed) for one in self.rows)
        return next((place for place, one in rows if one == wanted), None)

    def base(self, figure: str) -> FloatArray:
        """Of the base model, which has no seed."""
        (curve,) = self.of(BASE, figure).values()
        return curve


def estimate(seeds: Mapping[int, FloatArray]) -> dict[str, Any]:
    """Value, interval over utterances, deviation over seeds; shares, not percent."""
    curve = np.mean([*seeds.values()], axis=0)
    low, high = percentile_interval(curve[1:])
    own = [float(one[0]) for one in seeds.values()]
    stddev = float(np.std(own, ddof=1)) if len(own) > 1 else None
    return {"value": float(curve[0]), "interval": [low, high], "stddev": stddev, "seeds": len(own)}


def combined(
    formula: Callable[..., FloatArray], *parts: Mapping[int, FloatArray]
) -> dict[int, FloatArray]:
    """A formula of the averages of seeds that all parts have."""
    seeds = set.intersection(*(set(one) for one in parts))
    return {seed: formula(*(one[seed] for one in parts)) for seed in sorted(seeds)}


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Method -> figure -> estimate, and the knobs."""
    figures = Figures(row for row in rows if row.split == "test")
    found: dict[str, dict[str, Any]] = {}
    for row in figures.rows:
        if row.method not in found:
            found[row.method] = {"knobs": dict(row.knobs), **_of_method(figures, row.method)}
    return found


def _of_method(figures: Figures, method: str) -> dict[str, Any]:
    wanted = [NEW, BACKWARD]
    if method == "hierarchical":
        wanted.append(SHARED)
    if method in IN_SEQUENCE:
        wanted += [AFTER_FIRST, AFTER_LAST]
    curves = {figure: figures.of(method, figure) for figure in wanted}
    found = {figure: estimate(curve) for figure, curve in curves.items() if curve}
    if curves.get(AFTER_LAST):
        first, last = curves[AFTER_FIRST], curves[AFTER_LAST]
        base = figures.base(NEW)
        found["relative_rise"] = estimate(combined(lambda a, b: b / a - 1, first, last))
        found["gain_kept"] = estimate(combined(lambda a, b: (base - b) / (base - a), first, last))
    if method != BASE:
        base = figures.base(BACKWARD)
        found["forgetting"] = estimate(combined(lambda one: one - base, curves[BACKWARD]))
    if method not in (BASE, "blora") and (apart := figures.of("blora", NEW)):
        found["against_apart"] = estimate(combined(lambda a, b: a - b, curves[NEW], apart))
    return found


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Markdown."""
    heads = {
        NEW: "new domains",
        BACKWARD: "backward",
        "forgetting": "forgetting",
        AFTER_FIRST: "first domain, after it",
        AFTER_LAST: "after the last",
        "relative_rise": "rise",
        "gain_kept": "of its gain kept",
        "against_apart": "new domains against separate BLoRAs",
    }
    lines = [
        [
            method,
            told(one["knobs"]),
            *(_cell(one.get(name)) for name in heads),
        ]
        for method, one in found.items()
    ]
    print_table(["method", "knobs", *heads.values()], lines)


def told(knobs: Knobs) -> str:
    """As text."""
    return ", ".join(f"{name} {value:g}" for name, value in knobs.items())


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    low, high = (100 * end for end in one["interval"])
    spread = "" if one["stddev"] is None else f" ±{100 * one['stddev']:.1f}"
    return f"{100 * one['value']:.1f}{spread} [{low:.1f}, {high:.1f}]"
