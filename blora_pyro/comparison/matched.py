"""A method against the curve of another: who forgets less where both do the new domain as well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.measures import BACKWARD, Estimate, Scores
from blora_pyro.runs.outcomes import NEW_DOMAIN


@dataclass(frozen=True)
class Matched:
    """A candidate against the curve of another method, on the domains and seeds that both have.

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
    """A candidate against the curve through another method's candidates and the base.

    The curve is `lowest`, in every resampling anew.

    Args:
        scores: Of all of them.
        candidate: The one.
        others: Those of the other method, the chosen one first, and what it builds on (its knob at
            nothing); one that lacks a domain and seed of the first is left out.
        base: The base model.

    Returns:
        None if they have no domain and seed in common.
    """
    if not others:
        return None
    common = set(scores.places(others[0]))
    places = [place for place in scores.places(candidate) if place in common]
    points = [base, *(one for one in others if set(places) <= set(scores.places(one)))]
    parts = [(one, figure) for one in (candidate, *points) for figure in (NEW_DOMAIN, BACKWARD)]
    if not places:
        return None
    backward = scores.estimate(_backward_saved, parts, places)
    new_domain = scores.estimate(_new_domain_saved, parts, places)
    if backward is None or new_domain is None:
        return None
    return Matched(candidate, others[0].method.name, backward, new_domain)


def lowest(points: Sequence[tuple[float, float]], x: float) -> float:
    """The lowest y that is to be had at x or less, on the points and between any two of them.

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
