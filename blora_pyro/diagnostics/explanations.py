"""What the figures of a posterior mean, in plain English: how each prior shrinks, and k-hat."""

import itertools
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.guides import previous_posterior
from blora_pyro.posterior import Posterior

CLOSED = 0.9  # a rank with a shrinkage factor above this is switched off
MOSTLY = 0.5  # a larger share of a floor in the KL is explained

HOW = {
    "normal": (
        "A Normal prior pulls every weight towards 0 in proportion to its size, in every rank and "
        "layer alike: it makes updates small and switches nothing off."
    ),
    "laplace": (
        "A Laplace prior pulls with one force whatever a weight's size: small weights are pressed "
        "closer to 0 than under a Normal of the same width, large ones are held back less. It "
        "works weight by weight and knows nothing of ranks."
    ),
    "student-t": (
        "A Student-t prior (df {df:g}) holds on in the middle and lets go in the tails: weights "
        "near 0 are pulled like under a narrow Normal, one several scales away hardly at all. It "
        "works weight by weight and knows nothing of ranks."
    ),
    "scale-mixture": (
        "A scale mixture takes a weight for noise (a spike of width {spike_scale:g}, hard pull) or "
        "for signal (a slab of width {scale:g}, soft pull), weight by weight: small weights are "
        "pressed into the spike, large ones are left to the slab."
    ),
    "horseshoe": (
        "A horseshoe decides rank by rank, not weight by weight: a rank is left nearly as free as "
        "under a Normal of width {scale:g}, or is switched off with all its weights. Of {rank} "
        "ranks {active} are active in the median layer and {most_active} in the one with the most; "
        "{closed} of all ranks are switched off "
        f"(shrinkage factor above {CLOSED:g}). Contraction is high where ranks are off, too: their "
        "width is gone, whatever the data said."
    ),
    "learned-scale": (
        "A learned scale shrinks layer by layer: each factor of a layer has a Normal prior whose "
        "width was fitted, here from {narrowest:.2g} to {widest:.2g} (it started at {scale:g}). A "
        "layer that the data do not need gets a narrow prior and shrinks as a whole; within it "
        "all ranks are treated alike."
    ),
    "pretrained-scale": (
        "A pretrained scale shrinks layer by layer: each prior is {scale:g} times as wide as the "
        "layer's frozen weights, here from {narrowest:.2g} to {widest:.2g}, so a layer with small "
        "weights may move less. Within a layer it is a Normal and treats all ranks alike."
    ),
    "a-only": (
        "A Normal prior that pulls all weights in proportion to their size, but with noise in A "
        "alone: B is a point with an L2 pull, so contraction, signal-to-noise and KL are those of "
        "A, and the spread of ΔW is what A leaves open."
    ),
}
HOW[previous_posterior.NAME] = (
    "The prior is an earlier run's posterior, its deviations times {inflation:g}: every weight is "
    "pulled to where that run left it, the harder the surer it was (the widths of layers are "
    "{narrowest:.2g} to {widest:.2g}). Contraction is what the new data added, and KL how far they "
    "led away."
)
OWN = "The prior is your own code ({prior}); these figures show what it did to the weights."


@dataclass(frozen=True)
class Shrinkage:
    """What any prior's pull comes to, in figures that compare between priors.

    Attributes:
        directions: Directions of ΔW above their standard deviation in all layers; None where
            nothing has one.
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
        active_ranks: Median over layers and factors; None unless the prior is the horseshoe.
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
        """The figures of a posterior and its summary."""
        spread = any(any(row.singular_stddevs) for row in summary.updates)
        weights = sum(row.weights for row in summary.factors)
        active = [row.active_ranks for row in summary.factors if row.active_ranks is not None]
        factors: dict[str, torch.Tensor] = getattr(posterior.guide, "shrinkage", dict)()
        closed = torch.cat([one.flatten() > CLOSED for one in factors.values()] or [torch.empty(0)])
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


def kl_by_module(summary: Summary) -> dict[str, tuple[float, int]]:
    """KL of A and B of a layer, nats, and their number of weights; nothing of points."""
    totals: dict[str, tuple[float, int]] = {}
    for row in summary.factors:
        if row.kl is not None:
            kl, weights = totals.get(row.module, (0.0, 0))
            totals[row.module] = kl + row.kl, weights + row.weights
    return totals


def _above_the_floor(summary: Summary) -> dict[str, Any]:
    """`kl_floor`, `floor_share` and `half_kl_layers` of `Shrinkage`."""
    totals = kl_by_module(summary)
    if not totals:
        return {"kl_floor": None, "floor_share": None, "half_kl_layers": None}
    floor = min(kl / weights for kl, weights in totals.values())
    above = sorted((kl - floor * weights for kl, weights in totals.values()), reverse=True)
    whole = sum(kl for kl, _ in totals.values())
    sums = itertools.accumulate(above)
    half = next(count for count, part in enumerate(sums, 1) if part >= sum(above) / 2)
    return {"kl_floor": floor, "floor_share": 1 - sum(above) / whole, "half_kl_layers": half}


def how_it_shrinks(summary: Summary, shrinkage: Shrinkage, beta: float) -> str:
    """A paragraph on the run's prior, with the run's figures."""
    widths = [row.prior_stddev for row in summary.factors]
    text = HOW.get(summary.prior, OWN).format(
        **{
            **summary.prior_args,
            "prior": summary.prior,
            "rank": summary.rank,
            "narrowest": min(widths),
            "widest": max(widths),
            "active": _number(shrinkage.active_ranks),
            "most_active": _number(max((r.active_ranks or 0 for r in summary.factors), default=0)),
            "closed": _share(shrinkage.closed_ranks),
        }
    )
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
    facts.append(f"{_share(shrinkage.near_zero)} of the weights have |mean| < 0.001")
    text = f"To compare with other priors: {'; '.join(facts)}."
    if shrinkage.kl_floor is None:
        return text
    floor = (
        f"{_share(shrinkage.floor_share)} of the weights' KL is a floor that every layer pays "
        f"alike, {shrinkage.kl_floor:.2g} nats a weight"
    )
    if (shrinkage.floor_share or 0) > MOSTLY:
        floor += (
            " (the guide is narrower than the prior everywhere: it starts narrow, and noise costs "
            "likelihood in every layer; so compare layers, not totals)"
        )
    return (
        f"{text} {floor}; of what is above it, half sits in {shrinkage.half_kl_layers} of "
        f"{shrinkage.layers} layers."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"
