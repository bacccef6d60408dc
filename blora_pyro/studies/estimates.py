"""Figures of a study: errors, forgetting, and what is gained and lost against another method.

Every figure is worked out on the counts of utterances, as they are and for 1000 resamplings of the
utterances, in each of which all methods, seeds and data sets see the same ones of a set. An error
is pooled over a set, averaged over seeds, then over data sets; gain, drop and forgetting removed
are the formulas of `metrics` on those averages, and no averages of quotients.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from blora_pyro.metrics import backward_gain, forgetting, forgetting_removed, new_domain_drop
from blora_pyro.metrics.bootstrap import FloatArray, paired_rates, percentile_interval
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.methods import Candidate
from blora_pyro.studies.results import BASE, PIER, ScoredFit

DRAWS = 1000
BACKWARD = "backward"
PARTS = ("A", "B", "delta_w")
UNDEFINED = 0.05  # of the resamplings may leave a quotient undefined, else it has no interval

Repeat = tuple[str, int]  # data set and seed


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
    """A candidate against another, on the repeats that both have.

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
        repeats: Data sets and seeds that its figures are of.
        failed: Of these those whose fits failed; they are in no figure.
        new_domain: Error on the new domain.
        pier: Error on its points of interest; None if nothing is code-switched.
        backward: Error on the backward sets, macro-averaged.
        forgetting: The same less that of the base; None of the base itself.
        data: Data set -> error on it.
        sets: Backward set -> error on it.
        sparsity: `A`, `B`, `delta_w` -> share of elements below 1e-3, averaged; None where none is.
        weights: Of the adapter.
        bytes: Of its file.
        seconds: Of the fit, the median.
    """

    candidate: Candidate
    repeats: tuple[Repeat, ...]
    failed: tuple[Repeat, ...]
    new_domain: Estimate
    pier: Estimate | None
    backward: Estimate
    forgetting: Estimate | None
    data: Mapping[str, float]
    sets: Mapping[str, float]
    sparsity: Mapping[str, float | None]
    weights: int
    bytes: int
    seconds: float


class Scores:
    """All scores of one setting and split, resampled together."""

    def __init__(
        self, rows: Iterable[tuple[Candidate, Repeat, ScoredFit]], draws: int = DRAWS
    ) -> None:
        """Resample the utterances of every set.

        Args:
            rows: Of any candidates; those of the base stand for every seed.
            draws: Number of resamplings.
        """
        self.rows: dict[str, dict[Repeat, ScoredFit]] = {}
        self.failed: dict[str, list[Repeat]] = {}
        for candidate, repeat, row in rows:
            if row.failed:
                self.failed.setdefault(candidate.text, []).append(repeat)
            else:
                self.rows.setdefault(candidate.text, {})[repeat] = row
        self._curves = self._resample(draws)

    def _resample(self, draws: int) -> dict[tuple[str, Repeat, str], FloatArray]:
        """Return figures by candidate, repeat and name, observed and resampled, (1 + draws,)."""
        systems: dict[tuple[str, ...], list[tuple[str, Repeat]]] = {}
        for text, repeats in self.rows.items():
            for repeat, row in repeats.items():
                for name, measures in row.counts.items():
                    data = repeat[0] if name == NEW_DOMAIN else ""
                    for measure in {row.metrics[name], PIER} & measures.keys():
                        systems.setdefault((name, data, measure), []).append((text, repeat))
        curves: dict[tuple[str, Repeat, str], FloatArray] = {}
        for (name, data, measure), seen in systems.items():
            counts = [self.rows[text][repeat].counts[name][measure] for text, repeat in seen]
            rates = paired_rates(counts, draws, zlib.crc32(f"{name} {data}".encode()))
            figure = PIER if measure == PIER else name
            curves |= {(*key, figure): rate for key, rate in zip(seen, rates, strict=True)}
        for text, repeats in self.rows.items():
            for repeat, row in repeats.items():
                sets = [curves[text, repeat, name] for name in row.backward_sets]
                curves[text, repeat, BACKWARD] = np.mean(sets, axis=0)
        return curves

    def repeats(self, candidate: Candidate) -> list[Repeat]:
        """Return the data sets and seeds that a candidate is scored with."""
        return [*self.rows.get(candidate.text, {})]

    def _curve(self, candidate: Candidate, repeat: Repeat, figure: str) -> FloatArray | None:
        if candidate.method.name == BASE:  # it has no seed
            repeats = [one for one in self.repeats(candidate) if one[0] == repeat[0]]
            repeat = repeats[0] if repeats else repeat
        return self._curves.get((candidate.text, repeat, figure))

    def average(
        self, candidate: Candidate, figure: str, repeats: Sequence[Repeat]
    ) -> FloatArray | None:
        """Return a figure averaged over seeds, then data sets, (1 + draws,); None if one lacks it.

        Args:
            candidate: Of the rows.
            figure: `new_domain`, `pier`, `backward`, or the name of a set.
            repeats: Data sets and seeds.
        """
        by_data: dict[str, list[FloatArray]] = {}
        for repeat in repeats:
            curve = self._curve(candidate, repeat, figure)
            if curve is None:
                return None
            by_data.setdefault(repeat[0], []).append(curve)
        means = [np.mean(curves, axis=0) for curves in by_data.values()]
        return np.mean(means, axis=0) if means else None

    def estimate(
        self,
        formula: Callable[..., float],
        parts: Sequence[tuple[Candidate, str]],
        repeats: Sequence[Repeat],
    ) -> Estimate | None:
        """Return a formula of averages, with interval and deviation; None if one is lacking.

        Args:
            formula: Of as many numbers as there are parts.
            parts: Candidate and figure of each.
            repeats: Data sets and seeds.
        """
        averages = [self.average(*part, repeats) for part in parts]
        known = [one for one in averages if one is not None]
        if len(known) < len(parts):
            return None
        values = np.array([formula(*point) for point in zip(*known, strict=True)])
        seeds = []
        for seed in dict.fromkeys(seed for _, seed in repeats):
            here = [repeat for repeat in repeats if repeat[1] == seed]
            if len(here) == len({data for data, _ in repeats}):
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
        """Return the figures of a candidate; None without a row."""
        repeats = self.repeats(candidate)
        if not repeats:
            return None
        rows = self.rows[candidate.text]
        new_domain = self.estimate(_itself, [(candidate, NEW_DOMAIN)], repeats)
        backward = self.estimate(_itself, [(candidate, BACKWARD)], repeats)
        assert new_domain is not None and backward is not None
        both = [(candidate, BACKWARD), (base, BACKWARD)]
        names = next(iter(rows.values())).backward_sets
        made = [*rows.values()]
        return Result(
            candidate,
            tuple(repeats),
            tuple(self.failed.get(candidate.text, ())),
            new_domain,
            self.estimate(_itself, [(candidate, PIER)], repeats),
            backward,
            None if candidate.method.name == BASE else self.estimate(forgetting, both, repeats),
            {
                data: self._value(candidate, NEW_DOMAIN, [one for one in repeats if one[0] == data])
                for data in dict.fromkeys(data for data, _ in repeats)
            },
            {name: self._value(candidate, name, repeats) for name in names},
            {part: _mean(one.sparsity.get(part) for one in made) for part in PARTS},
            made[0].weights,
            made[0].bytes,
            float(np.median([one.seconds for one in made])),
        )

    def _value(self, candidate: Candidate, figure: str, repeats: Sequence[Repeat]) -> float:
        curve = self.average(candidate, figure, repeats)
        assert curve is not None
        return float(curve[0])

    def against(self, candidate: Candidate, other: Candidate, base: Candidate) -> Against | None:
        """Return a candidate against another; None if they have no data set and seed in common."""
        others = self.repeats(other)
        repeats = [one for one in self.repeats(candidate) if one in others]
        if candidate.method.name == BASE:
            repeats = others
        new, back = (
            [(one, figure) for one in (other, candidate)] for figure in (NEW_DOMAIN, BACKWARD)
        )
        gain = self.estimate(backward_gain, back, repeats)
        drop = self.estimate(new_domain_drop, new, repeats)
        removed = self.estimate(forgetting_removed, [*back, (base, BACKWARD)], repeats)
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


# ---- against a curve


@dataclass(frozen=True)
class Matched:
    """A candidate against the curve of another method, on the repeats that both have.

    Attributes:
        candidate: The one.
        method: Name of the other.
        backward: By how much its backward error is lower than the curve's at its own new-domain
            error. No value where the curve does not reach that.
        new_domain: By how much its new-domain error is lower than the curve's at its own backward
            error; likewise.
    """

    candidate: Candidate
    method: str
    backward: Estimate
    new_domain: Estimate


def match(
    scores: Scores, candidate: Candidate, others: Sequence[Candidate], base: Candidate
) -> Matched | None:
    """Return a candidate against the curve through another method's candidates and the base.

    The curve is `lowest`, in every resampling anew.

    Args:
        scores: Of all of them.
        candidate: The one.
        others: Those of the other method, the chosen one first, and what it builds on (its knob at
            nothing); one that lacks a repeat of the first is left out.
        base: The base model.

    Returns:
        None if they have no repeat in common.
    """
    if not others:
        return None
    common = set(scores.repeats(others[0]))
    repeats = [repeat for repeat in scores.repeats(candidate) if repeat in common]
    points = [base, *(one for one in others if set(repeats) <= set(scores.repeats(one)))]
    parts = [(one, figure) for one in (candidate, *points) for figure in (NEW_DOMAIN, BACKWARD)]
    if not repeats:
        return None
    backward = scores.estimate(_backward_saved, parts, repeats)
    new_domain = scores.estimate(_new_domain_saved, parts, repeats)
    if backward is None or new_domain is None:
        return None
    return Matched(candidate, others[0].method.name, backward, new_domain)


def lowest(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the lowest y that is reached at x or less, on the points and between any two of them.

    That is the lower convex hull, made monotone: it gives the curve of a few points the benefit of
    the doubt. Between a fit and the base lies, about, the fit with its update scaled down. nan left
    of all points.
    """
    found = [y for place, y in points if place <= x]
    for first, second in combinations(points, 2):
        (left, high), (right, low) = sorted((first, second))
        if left < x < right:
            found.append(high + (low - high) * (x - left) / (right - left))
    return min(found, default=math.nan)


def _backward_saved(new: float, back: float, *others: float) -> float:
    points = list(zip(others[::2], others[1::2], strict=True))
    return lowest(points, new) - back


def _new_domain_saved(new: float, back: float, *others: float) -> float:
    points = list(zip(others[1::2], others[::2], strict=True))
    return lowest(points, back) - new
