"""How a prior shrinks, in figures that compare between priors, and in plain English."""

import itertools
import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.errors import UserError
from blora_pyro.families import PREVIOUS_POSTERIOR
from blora_pyro.guides import load_family, previous_posterior
from blora_pyro.guides.contracts import shrinkage_of
from blora_pyro.posterior import Posterior
from blora_pyro.tables import number

SWITCHED_OFF = 0.9  # a rank with a shrinkage factor above this counts as switched off
HIGH_FLOOR = 0.5  # above this share in the KL its floor is explained

OWN = "The prior is your own code ({prior}); these figures show what it did to the weights."


@dataclass(frozen=True)
class Shrinkage:
    """How much a posterior was shrunk, in figures that compare between priors.

    Attributes:
        directions: Directions of ΔW above their standard deviation; None where nothing has one.
        median_directions: The same in the median layer.
        all_directions: Their number, whatever their size: the sum of the ranks.
        effective_rank: Mean over the layers, each as heavy as its ‖ΔW‖².
        near_zero: Share of all elements of A and B with |mean| < 1e-3.
        peak: Largest over median |mean| of all weights; None if half of the means are 0.
        layers: Number of layers.
        kl_floor: KL that every weight pays wherever it is: the least mean KL a weight of a layer,
            nats; None without KL.
        floor_share: Share of the weights' KL that is this floor.
        half_kl_layers: The fewest layers that hold half of what is above the floor.
        active_ranks: Median over layers and factors; None for guides without shrinkage factors.
        closed_ranks: Share of all ranks that are switched off, likewise.
    """

    directions: int | None
    median_directions: float | None
    all_directions: int
    effective_rank: float
    near_zero: float
    peak: float | None
    layers: int
    kl_floor: float | None
    floor_share: float | None
    half_kl_layers: int | None
    active_ranks: float | None
    closed_ranks: float | None

    @classmethod
    def of(cls, posterior: Posterior, summary: Summary) -> "Shrinkage":
        """Return the figures of a posterior with this summary."""
        spread = any(any(row.singular_stddevs) for row in summary.updates)
        weights = sum(row.weights for row in summary.factors)
        active = [row.active_ranks for row in summary.factors if row.active_ranks is not None]
        factors = [one.flatten() for one in shrinkage_of(posterior.guide).values()]
        closed = torch.cat(factors or [torch.empty(0)]) > SWITCHED_OFF
        directions = [row.directions for row in summary.updates]
        sizes = [row.norm**2 for row in summary.updates]
        ranks = [row.effective_rank for row in summary.updates]
        return cls(
            directions=sum(directions) if spread else None,
            median_directions=float(median(directions)) if spread else None,
            all_directions=sum(len(row.singular_values) for row in summary.updates),
            effective_rank=fmean(ranks, sizes) if any(sizes) else fmean(ranks),
            near_zero=sum(row.near_zero * row.weights for row in summary.factors) / weights,
            peak=_peak(posterior),
            layers=len(summary.updates),
            **_above_the_floor(summary),
            active_ranks=median(active) if active else None,
            closed_ranks=float(closed.float().mean()) if active else None,
        )


def _peak(posterior: Posterior) -> float | None:
    sizes = torch.cat([mean.cpu().abs().flatten() for mean in posterior.mean.values()])
    middle = float(sizes.median())
    return float(sizes.max()) / middle if middle else None


def _above_the_floor(summary: Summary) -> dict[str, Any]:
    """Return `kl_floor`, `floor_share` and `half_kl_layers` of `Shrinkage`."""
    totals, floor = summary.kl_by_module().values(), summary.kl_floor
    if floor is None or not math.isfinite(sum(kl for kl, _ in totals)):  # that of a point
        return {"kl_floor": None, "floor_share": None, "half_kl_layers": None}
    above = sorted((kl - floor * weights for kl, weights in totals), reverse=True)
    share = 1 - sum(above) / sum(kl for kl, _ in totals)
    sums = itertools.accumulate(above)
    half = next(count for count, part in enumerate(sums, 1) if part >= sum(above) / 2)
    return {"kl_floor": floor, "floor_share": share, "half_kl_layers": half}


def how_it_shrinks(summary: Summary, shrinkage: Shrinkage, beta: float) -> str:
    """Return a paragraph on the run's prior: its family's `EXPLANATION`, and the run's figures.

    An explanation may name the prior's arguments (`{scale:g}`), and these figures: `rank`;
    `narrowest` and `widest`, standard deviations of the prior over the factors of all layers;
    and, for priors that shrink rank by rank, `active` and `most_active`, the effective number of
    ranks in the median layer and the largest, and `closed`, the share of ranks switched off.

    Raises:
        UserError: If an explanation names something else.
    """
    chained = summary.prior == PREVIOUS_POSTERIOR
    family = previous_posterior if chained else load_family(summary.prior)
    widths = [row.prior_stddev for row in summary.factors]
    figures = {
        "prior": summary.prior,
        "rank": summary.rank,
        "narrowest": min(widths),
        "widest": max(widths),
        "active": number(shrinkage.active_ranks, ".1f"),
        "most_active": f"{max((row.active_ranks or 0 for row in summary.factors), default=0):.1f}",
        "closed": number(shrinkage.closed_ranks, ".0%"),
        "switched_off": SWITCHED_OFF,
    }
    try:
        text = getattr(family, "EXPLANATION", OWN).format(**{**summary.prior_args, **figures})
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"EXPLANATION of prior {summary.prior} can't be filled in ({error}); name arguments of "
            f"the prior, or {', '.join(figures)}"
        ) from None
    if summary.guide == "point":
        text += (
            " The guide is a point, the MAP estimate: no spread, and so no contraction, "
            "signal-to-noise or KL to report."
        )
    if beta == 0:
        text += " With beta = 0 the prior had no say: what follows is what the data alone left."
    return f"{text} {_like_for_like(summary, shrinkage)}"


def _like_for_like(summary: Summary, shrinkage: Shrinkage) -> str:
    facts = []
    if shrinkage.directions is not None:
        most = max(row.directions for row in summary.updates)
        facts.append(
            f"{shrinkage.directions:,} of {shrinkage.all_directions:,} directions of ΔW stand "
            f"above their spread ({shrinkage.median_directions:g} of {summary.rank} in the median "
            f"layer, at most {most})"
        )
    facts.append(f"the effective rank is {shrinkage.effective_rank:.1f}, layers weighed by ‖ΔW‖²")
    if shrinkage.peak is not None:
        facts.append(f"the largest |mean| is {shrinkage.peak:,.0f} times the median one")
    facts.append(f"{shrinkage.near_zero:.0%} of the weights have |mean| < 0.001")
    text = f"To compare with other priors: {'; '.join(facts)}."
    if shrinkage.kl_floor is None:
        return text
    floor = (
        f"{shrinkage.floor_share:.0%} of the weights' KL is a floor that every layer pays "
        f"alike, {shrinkage.kl_floor:.2g} nats a weight"
    )
    if (shrinkage.floor_share or 0) > HIGH_FLOOR:
        floor += (
            " (the guide is narrower than the prior everywhere: it starts narrow, and noise costs "
            "likelihood in every layer; so compare layers, not totals)"
        )
    return (
        f"{text} {floor}; of what is above it, half sits in {shrinkage.half_kl_layers} of "
        f"{shrinkage.layers} layers."
    )
