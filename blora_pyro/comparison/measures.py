"""Figures of a comparison: errors, forgetting, and what is gained and lost against LoRA.

Every figure is worked out on the rows' counts, for the utterances as they are and for 1000
resamplings of them, in each of which all methods, seeds and domains see the same utterances of a
set. An error is pooled over a set, averaged over seeds, then over domains; gain, drop and
forgetting removed are the formulas of `metrics` on those averages, and no averages of quotients.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.methods import BASE
from blora_pyro.comparison.rows import PIER, Row
from blora_pyro.metrics import backward_gain, forgetting, forgetting_removed, new_domain_drop
from blora_pyro.metrics.bootstrap import FloatArray, paired_rates, percentile_interval
from blora_pyro.runs.outcomes import NEW_DOMAIN

DRAWS = 1000
BACKWARD = "backward"
UNDEFINED = 0.05  # of the resamplings may leave a quotient undefined, else it has no interval

Place = tuple[str, int]  # domain and seed


@dataclass(frozen=True)
class Estimate:
    """A figure.

    Attributes:
        value: The figure; a rate or a share is a fraction. None where it is not defined.
        interval: 95% percentile-bootstrap interval over utterances; None where it has none.
        stddev: Standard deviation over seeds; None with fewer than two.
    """

    value: float | None
    interval: tuple[float, float] | None
    stddev: float | None


@dataclass(frozen=True)
class Against:
    """A candidate against another, on the domains and seeds that both have.

    Attributes:
        candidate: The one.
        other: The other, a LoRA.
        backward_gain: See `metrics.backward_gain`.
        new_domain_drop: See `metrics.new_domain_drop`.
        forgetting_removed: See `metrics.forgetting_removed`.
    """

    candidate: Candidate
    other: Candidate
    backward_gain: Estimate
    new_domain_drop: Estimate
    forgetting_removed: Estimate


@dataclass(frozen=True)
class Result:
    """A candidate on its test sets.

    Attributes:
        candidate: A method at a value of its knob.
        places: Domains and seeds that its figures are of.
        failed: Of these those whose fits failed; they are in no figure.
        new_domain: Error on the new domain.
        pier: Error on its points of interest; None if nothing is code-switched.
        backward: Error on the held-out sets, macro-averaged.
        forgetting: The same less that of the base; None of the base itself.
        domains: Domain -> error on it.
        sets: Held-out set -> error on it.
        sparsity: `A`, `B`, `delta_w` -> share of elements below 1e-3, averaged; None where none is.
        weights: Of the adapter.
        bytes: Of its file.
        seconds: Of the fit, the median.
    """

    candidate: Candidate
    places: tuple[Place, ...]
    failed: tuple[Place, ...]
    new_domain: Estimate
    pier: Estimate | None
    backward: Estimate
    forgetting: Estimate | None
    domains: Mapping[str, float]
    sets: Mapping[str, float]
    sparsity: Mapping[str, float | None]
    weights: int
    bytes: int
    seconds: float


class Scores:
    """All rows of one setting and split, resampled together."""

    def __init__(self, rows: Iterable[tuple[Candidate, Place, Row]], draws: int = DRAWS) -> None:
        """Resample.

        Args:
            rows: Of any candidates; those of the base stand for every seed.
            draws: Number of resamplings.
        """
        self.rows: dict[str, dict[Place, Row]] = {}
        self.failed: dict[str, list[Place]] = {}
        for candidate, place, row in rows:
            if row.failed:
                self.failed.setdefault(candidate.text, []).append(place)
            else:
                self.rows.setdefault(candidate.text, {})[place] = row
        self._curves = self._resample(draws)

    def _resample(self, draws: int) -> dict[tuple[str, Place, str], FloatArray]:
        """(candidate, place, figure) -> the figure, observed and resampled, (1 + draws,)."""
        systems: dict[tuple[str, ...], list[tuple[str, Place]]] = {}
        for text, places in self.rows.items():
            for place, row in places.items():
                for name, measures in row.counts.items():
                    domain = place[0] if name == NEW_DOMAIN else ""
                    for measure in {row.metrics[name], PIER} & measures.keys():
                        systems.setdefault((name, domain, measure), []).append((text, place))
        curves: dict[tuple[str, Place, str], FloatArray] = {}
        for (name, domain, measure), seen in systems.items():
            counts = [self.rows[text][place].counts[name][measure] for text, place in seen]
            rates = paired_rates(counts, draws, zlib.crc32(f"{name} {domain}".encode()))
            figure = PIER if measure == PIER else name
            curves |= {(*key, figure): rate for key, rate in zip(seen, rates, strict=True)}
        for text, places in self.rows.items():
            for place, row in places.items():
                sets = [curves[text, place, name] for name in row.backward_sets]
                curves[text, place, BACKWARD] = np.mean(sets, axis=0)
        return curves

    def places(self, candidate: Candidate) -> list[Place]:
        """Domains and seeds that there are rows of."""
        return [*self.rows.get(candidate.text, {})]

    def _curve(self, candidate: Candidate, place: Place, figure: str) -> FloatArray | None:
        if candidate.method.name == BASE:  # it has no seed
            places = [one for one in self.places(candidate) if one[0] == place[0]]
            place = places[0] if places else place
        return self._curves.get((candidate.text, place, figure))

    def average(
        self, candidate: Candidate, figure: str, places: Sequence[Place]
    ) -> FloatArray | None:
        """A figure over the seeds, then over the domains, (1 + draws,); None where one is lacking.

        Args:
            candidate: Of the rows.
            figure: `new_domain`, `pier`, `backward`, or the name of a set.
            places: Domains and seeds.
        """
        domains: dict[str, list[FloatArray]] = {}
        for place in places:
            curve = self._curve(candidate, place, figure)
            if curve is None:
                return None
            domains.setdefault(place[0], []).append(curve)
        means = [np.mean(curves, axis=0) for curves in domains.values()]
        return np.mean(means, axis=0) if means else None

    def estimate(
        self,
        formula: Callable[..., float],
        parts: Sequence[tuple[Candidate, str]],
        places: Sequence[Place],
    ) -> Estimate | None:
        """A formula of averages, with interval and deviation; None where an average is lacking.

        Args:
            formula: Of as many numbers as there are parts.
            parts: Candidate and figure of each.
            places: Domains and seeds.
        """
        averages = [self.average(*part, places) for part in parts]
        known = [one for one in averages if one is not None]
        if len(known) < len(parts):
            return None
        values = np.array([formula(*point) for point in zip(*known, strict=True)])
        seeds = []
        for seed in dict.fromkeys(seed for _, seed in places):
            here = [place for place in places if place[1] == seed]
            if len(here) == len({domain for domain, _ in places}):
                each = [self.average(*part, here) for part in parts]
                seeds.append(formula(*(float(one[0]) for one in each if one is not None)))
        stddev = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan
        undefined = float(np.isnan(values[1:]).mean())
        low, high = percentile_interval(values[1:])
        lacking = undefined > UNDEFINED or math.isnan(low)
        return Estimate(
            _number(float(values[0])), None if lacking else (low, high), _number(stddev)
        )

    # ---- what the tables hold

    def result(self, candidate: Candidate, base: Candidate) -> Result | None:
        """The figures of a candidate; None without a row."""
        places = self.places(candidate)
        if not places:
            return None
        rows = self.rows[candidate.text]
        new_domain = self.estimate(_itself, [(candidate, NEW_DOMAIN)], places)
        backward = self.estimate(_itself, [(candidate, BACKWARD)], places)
        assert new_domain is not None and backward is not None
        both = [(candidate, BACKWARD), (base, BACKWARD)]
        names = next(iter(rows.values())).backward_sets
        about = [row.about for row in rows.values()]
        return Result(
            candidate,
            tuple(places),
            tuple(self.failed.get(candidate.text, ())),
            new_domain,
            self.estimate(_itself, [(candidate, PIER)], places),
            backward,
            None if candidate.method.name == BASE else self.estimate(forgetting, both, places),
            {
                domain: self._value(candidate, NEW_DOMAIN, [p for p in places if p[0] == domain])
                for domain in dict.fromkeys(domain for domain, _ in places)
            },
            {name: self._value(candidate, name, places) for name in names},
            {part: _mean(one["sparsity"][part] for one in about) for part in about[0]["sparsity"]},
            about[0]["adapter"]["weights"],
            about[0]["adapter"]["bytes"],
            float(np.median([one["seconds"]["fit"] for one in about])),
        )

    def _value(self, candidate: Candidate, figure: str, places: Sequence[Place]) -> float:
        curve = self.average(candidate, figure, places)
        assert curve is not None
        return float(curve[0])

    def against(self, candidate: Candidate, other: Candidate, base: Candidate) -> Against | None:
        """A candidate against another; None if they have no domain and seed in common."""
        others = self.places(other)
        places = [one for one in self.places(candidate) if one in others]
        if candidate.method.name == BASE:
            places = others
        new, back = (
            [(one, figure) for one in (other, candidate)] for figure in (NEW_DOMAIN, BACKWARD)
        )
        gain = self.estimate(backward_gain, back, places)
        drop = self.estimate(new_domain_drop, new, places)
        removed = self.estimate(forgetting_removed, [*back, (base, BACKWARD)], places)
        if gain is None or drop is None or removed is None:
            return None
        return Against(candidate, other, gain, drop, removed)


def _itself(value: float) -> float:
    return value


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def to_json(one: Any) -> dict[str, Any] | None:
    """As JSON has it: candidates by their texts."""
    if one is None:
        return None
    names = {name: getattr(one, name).text for name in ("candidate", "other") if hasattr(one, name)}
    return {**asdict(one), **names}
