"""Separately fitted runs made into one adapter, on the level of ΔW.

A and B are identified only up to A -> R⁻¹A, B -> BR, so those of separate fits can't be averaged
element by element; ΔW = alpha/rank · B A can.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.adapters import SAME_WEIGHTS
from blora_pyro.errors import UserError
from blora_pyro.models.folders import is_same_place
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.factors import Factors, posterior_factors, posterior_of, prior_factors
from blora_pyro.posterior.pruning import keep_directions, not_null
from blora_pyro.posterior.spectra import spectra

PRODUCT, MEAN, WEIGHTED = METHODS = ("product", "mean", "weighted")
ROUNDING = 1e-6  # of a singular value, in units of ‖A‖ ‖B‖


def combine(
    posteriors: Sequence[Posterior],
    method: str = MEAN,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> tuple[Posterior, float]:
    """One posterior of several that were fitted to one base and the same layers.

    - `mean` and `weighted`: ΔW = Σ w_i ΔW_i, w_i = 1/K or as given (they need not add up to 1: 1,1
      adds the updates). With A and B of all runs one after the other, rank Σ r_i holds it exactly,
      its spread, too; a smaller rank keeps the first singular directions.
    - `product`: see `multiply`. It is no sum of low-rank matrices: singular directions of it are
      kept, by default as many as the largest rank of the runs, and no spread.

    Args:
        posteriors: Two or more.
        method: `product`, `mean` or `weighted`.
        weights: One for each, for `weighted`.
        rank: Of the result; None is as above.

    Returns:
        The posterior, whose guide is independent Normals and which has no prior, and the share of
        the Frobenius norm of ΔW, all layers together, that is kept.

    Raises:
        UserError: If the posteriors do not match, have no spread or prior that `product` needs, or
            an option can't be.
    """
    shares = _check(posteriors, method, weights)
    for number, other in enumerate(posteriors[1:], 2):
        check_alike(posteriors[0], other, ("run 1", f"run {number}"))
    layers = [posterior_factors(one) for one in posteriors]
    _check_rank(rank, layers[0])
    scaling = posteriors[0].scaling
    if method == PRODUCT:
        rank = max(one.rank for one in posteriors) if rank is None else rank
        priors = [prior_factors(one) for one in posteriors]
        products = (
            (name, multiply([one[name] for one in layers], [one[name] for one in priors]), first)
            for name, first in layers[0].items()
        )
        return _truncated(posteriors[0], products, rank, scaling)
    found = {
        name: _side_by_side(
            [one[name].times(w, scaling) for one, w in zip(layers, shares, strict=True)]
        )
        for name in layers[0]
    }
    whole = posterior_of(posteriors[0], found)
    if rank is None or rank >= whole.rank:
        return whole, 1.0
    return _first_directions(whole, rank)


def multiply(runs: Sequence[Factors], priors: Sequence[Factors]) -> Tensor:
    """Mean of the product of Gaussians of one layer's ΔW, the prior counted once.

    With the K runs' data independent given the weights, p(ΔW | D_1 ... D_K) is in proportion to
    Π_i p(ΔW | D_i) / p(ΔW)^(K-1). In a Gaussian approximation, element by element, with means m_i,
    variances v_i and those of the priors, m0_i and v0_i:

        P    = Σ_i 1/v_i - (K-1)/K Σ_i 1/v0_i
        mean = (Σ_i m_i/v_i - (K-1)/K Σ_i m0_i/v0_i) / P

    Where the priors differ it is their geometric mean that is counted once. The approximation is in
    three places: q stands for the posterior; ΔW = s B A is taken for Gaussian, and its elements for
    independent (see `Factors.moments`); and since v_i, unlike a Gaussian posterior's variance, may
    exceed v0_i (that of a product grows with the means of its factors), it is taken for v0_i there.
    So data add where they said little, and are averaged, the surer the heavier, where they said
    much.

    Args:
        runs: The layer under each posterior.
        priors: The layer under each prior, likewise.

    Returns:
        (out_features, in_features), double.

    Raises:
        UserError: If an element has no spread.
    """
    extra = (len(runs) - 1) / len(runs)
    total, precision = torch.tensor(0.0), torch.tensor(0.0)
    for run, prior in zip(runs, priors, strict=True):
        (mean, variance), (mean0, variance0) = run.moments(), prior.moments()
        if not bool((variance > 0).all()):
            raise UserError(
                "a run has elements of ΔW without a spread; give method mean or weighted"
            )
        variance = torch.minimum(variance, variance0)
        total = total + mean / variance - extra * mean0 / variance0
        precision = precision + 1 / variance - extra / variance0
    return total / precision


def _side_by_side(parts: Sequence[Factors]) -> Factors:
    """The sum of some ΔW of one layer and one scaling: all of their directions."""
    return replace(
        parts[0],
        a=torch.cat([one.a for one in parts], 0),
        b=torch.cat([one.b for one in parts], 1),
        var_a=torch.cat([one.var_a for one in parts], 0),
        var_b=torch.cat([one.var_b for one in parts], 1),
    )


def _truncated(
    like: Posterior, deltas: Iterable[tuple[str, Tensor, Factors]], rank: int, scaling: float
) -> tuple[Posterior, float]:
    """The first singular directions of given ΔW, as a point; and the share of the norm.

    ΔW come one at a time (name, ΔW, some factors of the layer): all together they are as large as
    the model.
    """
    found, squares, kept = {}, 0.0, 0.0
    for name, delta, of_layer in deltas:
        u, values, vh = torch.linalg.svd(delta.float(), full_matrices=False)
        root = (values[:rank] / scaling).sqrt().double()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        zeros = torch.zeros_like(a), torch.zeros_like(b)
        found[name] = Factors(a, b, *zeros, scaling, of_layer.weight_stddev)
        squares += float(values.double().square().sum())
        kept += float(values[:rank].double().square().sum())
    return posterior_of(like, found), _share(kept, squares)


def _first_directions(whole: Posterior, rank: int) -> tuple[Posterior, float]:
    """The first singular directions of a posterior, and the share of the norm that they hold."""
    found, keep = spectra(whole), {}
    for group, one in zip(whole.groups, found.values(), strict=True):
        a, b = (whole.mean[site.name].flatten(1).norm(dim=1) for site in group.sites)
        rounding = ROUNDING * whole.scaling * a * b  # all that is left where runs cancel out
        first = torch.arange(one.values.shape[1]) < rank
        keep[group.key] = not_null(one) & first & (one.values > rounding[:, None])
    if not any(mask.any() for mask in keep.values()):
        raise UserError("the runs cancel each other out, nothing is left; give other weights")
    kept = sum(float(found[key].values[mask].square().sum()) for key, mask in keep.items())
    squares = sum(float(one.values.square().sum()) for one in found.values())
    return keep_directions(whole, found, keep), _share(kept, squares)


def _share(kept: float, squares: float) -> float:
    return min(1.0, math.sqrt(kept / squares)) if squares else 1.0


def _check(
    posteriors: Sequence[Posterior], method: str, weights: Sequence[float] | None
) -> Sequence[float]:
    """Refuse what can't be combined; the weights of the sum."""
    count = len(posteriors)
    if method not in METHODS:
        raise UserError(f"method is '{method}'; give one of {', '.join(METHODS)}")
    if count < 2:
        raise UserError(f"{count} run is given; give two or more to combine")
    if (method == WEIGHTED) != (weights is not None):
        wrong = "given" if weights is not None else "not given"
        raise UserError(f"method is {method} and weights are {wrong}; give both, or neither")
    shares = [1 / count] * count if weights is None else list(weights)
    if len(shares) != count:
        raise UserError(f"{len(shares)} weights are given for {count} runs; give one for each")
    if not all(map(math.isfinite, shares)) or not any(shares):
        shown = ", ".join(f"{one:g}" for one in shares)
        raise UserError(f"weights are {shown}; give finite numbers, not all of them 0")
    return shares


def _check_rank(rank: int | None, layers: Mapping[str, Factors]) -> None:
    largest = min(min(one.shape) for one in layers.values())
    if rank is not None and not 1 <= rank <= largest:
        raise UserError(f"rank is {rank}; give a number from 1 to {largest}")


def check_alike(one: Posterior, other: Posterior, names: Sequence[str]) -> None:
    """Refuse posteriors of other bases or layers than each other's.

    Args:
        one: The first of them.
        other: The other.
        names: What they are called.

    Raises:
        UserError: Naming what differs.
    """
    bases = [f"{p.base} (revision {p.revision})" if p.revision else p.base for p in (one, other)]
    if not is_same_place(one.base, other.base) or one.revision != other.revision:
        raise UserError(
            f"{names[0]} was fitted on {bases[0]}, {names[1]} on {bases[1]}; give runs of one base"
        )
    shapes = [
        {
            name: (group.out_features, group.in_features)
            for group in p.groups
            for name in group.modules
        }
        for p in (one, other)
    ]
    if shapes[0] != shapes[1]:
        counts = [len(some) for some in shapes]
        odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise UserError(
            f"{names[0]} adapts {counts[0]} layers, {names[1]} {counts[1]}, and they differ in "
            f"{len(odd)}, such as {odd[0]}; give runs with the same target modules"
        )
    stddevs = [
        {n: s for group in p.groups for n, s in zip(group.modules, group.weight_stddevs)}  # noqa: B905
        for p in (one, other)
    ]
    for name in stddevs[0].keys() & stddevs[1].keys():
        if not math.isclose(stddevs[0][name], stddevs[1][name], rel_tol=SAME_WEIGHTS):
            raise UserError(
                f"{names[0]} and {names[1]} were fitted on other weights under one name, "
                f"{one.base} ({name} differs); give runs of one base"
            )
