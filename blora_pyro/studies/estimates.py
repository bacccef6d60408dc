"""Figures of a study: errors, forgetting, and what is gained and lost against another method.

Every figure is worked out on the counts of utterances, as they are and for 1000 resamplings of the
utterances and of the seeds, in each of which all methods see the same utterances of a set and the
same seeds. An error is pooled over a set, averaged over seeds, then over data sets; gain, drop and
forgetting removed are the formulas of `metrics` on those averages, and no averages of quotients.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from blora_pyro.metrics import backward_gain, forgetting_removed, new_domain_drop
from blora_pyro.metrics.bootstrap import FloatArray, paired_rates, percentile_interval
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.methods import BASE, Candidate
from blora_pyro.studies.results import PIER, ScoredFit
from blora_pyro.tables import Percent

DRAWS = 1000
BACKWARD = "backward"
CURVE_POINTS = 3  # at least, the base among them: two are but a straight line
UNDEFINED = 0.05  # of the resamplings may leave a quotient undefined, else it has no interval

Repeat = tuple[str, int]  # data set and seed


class Resampled:
    """All scores of one setting and split, their utterances resampled together.

    Attributes:
        scores: Candidate's text -> data set and seed -> its score; failed ones are left out.
    """

    def __init__(self, scores: Iterable[ScoredFit], draws: int = DRAWS) -> None:
        """Resample the utterances of every set.

        Args:
            scores: Of any candidates; those of the base stand for every seed.
            draws: Number of resamplings.
        """
        self.scores: dict[str, dict[Repeat, ScoredFit]] = {}
        systems: dict[tuple[str, ...], list[ScoredFit]] = {}
        for one in scores:
            if one.failed:
                continue
            self.scores.setdefault(one.candidate, {})[one.data, one.seed] = one
            for name, measures in one.counts.items():
                data = one.data if name == NEW_DOMAIN else ""
                for measure in {one.metrics[name], PIER} & measures.keys():
                    systems.setdefault((name, data, measure), []).append(one)
        self.draws = draws
        self._curves: dict[tuple[str, Repeat, str], FloatArray] = {}
        for (name, data, measure), own in systems.items():
            counts = [one.counts[name][measure] for one in own]
            rates = paired_rates(counts, draws, zlib.crc32(f"{name} {data}".encode()))
            figure = PIER if measure == PIER else name
            for one, rate in zip(own, rates, strict=True):
                self._curves[one.candidate, (one.data, one.seed), figure] = rate
        for text, repeats in self.scores.items():
            for repeat, one in repeats.items():
                sets = [self._curves[text, repeat, name] for name in one.backward_sets]
                self._curves[text, repeat, BACKWARD] = np.mean(sets, axis=0)

    def repeats(self, candidate: Candidate) -> list[Repeat]:
        """Return the data sets and seeds that a candidate is scored with."""
        return [*self.scores.get(candidate.text, {})]

    def _average(
        self, candidate: Candidate, figure: str, repeats: Sequence[Repeat]
    ) -> FloatArray | None:
        """Return a figure averaged over seeds, then data sets; None if one lacks it.

        Shape (1 + draws,): as it is, and in every resampling.
        """
        by_data: dict[str, list[FloatArray]] = {}
        for repeat in repeats:
            if candidate.method.name == BASE:  # it has no seed
                own = [one for one in self.repeats(candidate) if one[0] == repeat[0]]
                repeat = own[0] if own else repeat
            if (curve := self._curves.get((candidate.text, repeat, figure))) is None:
                return None
            by_data.setdefault(repeat[0], []).append(curve)
        means = [
            (np.stack(own) * _seed_weights(len(own), self.draws)).sum(0) for own in by_data.values()
        ]
        return np.mean(means, axis=0) if means else None

    def estimate(
        self,
        parts: Sequence[tuple[Candidate, str]],
        repeats: Sequence[Repeat],
        formula: Callable[..., float] | None = None,
    ) -> Percent | None:
        """Return a formula of averages, with interval and deviation; None if one is lacking.

        The interval is the 95% percentile-bootstrap interval over utterances and seeds (of one
        seed over utterances alone), None where it has none; the deviation that over seeds, None
        with fewer than two.

        Args:
            parts: Candidate and figure of each: `new_domain`, `pier`, `backward`, or a set's name.
            repeats: Data sets and seeds.
            formula: Of as many numbers as there are parts; None is the one part itself.
        """

        def values(some: Sequence[Repeat], draws: int | None = None) -> FloatArray | None:
            averages = [self._average(*part, some) for part in parts]
            known = [one[:draws] for one in averages if one is not None]
            if len(known) < len(parts):
                return None
            return (
                np.array([formula(*one) for one in zip(*known, strict=True)])
                if formula
                else known[0]
            )

        if (found := values(repeats)) is None:
            return None
        by_seed: dict[int, list[Repeat]] = {}
        for repeat in repeats:
            by_seed.setdefault(repeat[1], []).append(repeat)
        whole = [own for own in by_seed.values() if len(own) == len({data for data, _ in repeats})]
        seeds = [float(one[0]) for own in whole if (one := values(own, 1)) is not None]
        interval, value = percentile_interval(found[1:]), float(found[0])
        deviation = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan
        lacking = np.isnan(found[1:]).mean() > UNDEFINED or math.isnan(interval[0])
        return Percent(
            None if math.isnan(value) else value,
            None if lacking else interval,
            None if math.isnan(deviation) else deviation,
            signed=formula is not None,
        )

    def against(
        self, candidate: Candidate, other: Candidate, base: Candidate
    ) -> dict[str, Percent]:
        """Return gain, drop and forgetting removed against another; {} without a common repeat."""
        others = self.repeats(other)
        repeats = [one for one in self.repeats(candidate) if one in others]
        new, back = [[(one, name) for one in (other, candidate)] for name in (NEW_DOMAIN, BACKWARD)]
        removed = [*back, (base, BACKWARD)]
        return _if_all(
            backward_gain=self.estimate(back, repeats, backward_gain),
            new_domain_drop=self.estimate(new, repeats, new_domain_drop),
            forgetting_removed=self.estimate(removed, repeats, forgetting_removed),
        )

    def match(
        self, candidate: Candidate, others: Sequence[Candidate], base: Candidate
    ) -> dict[str, Percent]:
        """Return by how much a candidate's errors lie below the curve of another method.

        The curve is `lowest` through the other method's candidates and the base, in every
        resampling anew. `lower_backward` is at the candidate's new-domain error, without a value
        where the curve does not reach that; `lower_new_domain` at its backward error.

        Args:
            candidate: The one.
            others: Those of the other method, the chosen one first, and what it builds on (its knob
                at nothing); one that lacks a repeat of the first is left out.
            base: The base model.

        Returns:
            {} without a common repeat, or where fewer than `CURVE_POINTS` points make the curve.
        """
        common = self.repeats(others[0]) if others else []
        repeats = [repeat for repeat in self.repeats(candidate) if repeat in common]
        points = [base, *(one for one in others if {*repeats} <= {*self.repeats(one)})]
        if len(points) < CURVE_POINTS:
            return {}
        parts = [(one, figure) for one in (candidate, *points) for figure in (NEW_DOMAIN, BACKWARD)]

        def saved(x: float, y: float, *curve: float) -> float:
            return lowest([*zip(curve[::2], curve[1::2], strict=True)], x) - y

        swapped = [part for pair in zip(parts[1::2], parts[::2], strict=True) for part in pair]
        return _if_all(
            lower_backward=self.estimate(parts, repeats, saved),
            lower_new_domain=self.estimate(swapped, repeats, saved),
        )


def _seed_weights(seeds: int, draws: int) -> FloatArray:
    """Return what each seed counts in an average: as it is, and in every resampling of the seeds.

    Returns:
        Shape (seeds, 1 + draws); columns sum to 1, and the first is even.
    """
    picked = np.random.default_rng(seeds).multinomial(seeds, [1 / seeds] * seeds, draws)
    return np.vstack([np.ones(seeds), picked]).T / seeds


def _if_all(**found: Percent | None) -> dict[str, Percent]:
    known = {name: one for name, one in found.items() if one is not None}
    return known if len(known) == len(found) else {}


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
