"""One adapter from separately fitted runs, combined on the level of ΔW.

A and B are identified only up to A -> R⁻¹A, B -> BR, so those of separate fits can't be averaged
element by element; ΔW = alpha/rank · B A can.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from blora_pyro.adapters import SAME_WEIGHTS, Group
from blora_pyro.errors import UserError
from blora_pyro.families import NO_PRIOR
from blora_pyro.models.folders import is_same_place
from blora_pyro.posterior.family import Family
from blora_pyro.posterior.posterior import Posterior
from blora_pyro.posterior.spectra import keep_directions, not_null, spectra

PRODUCT, MEAN, WEIGHTED = COMBINING_METHODS = ("product", "mean", "weighted")
ROUNDING = 1e-6  # error of a singular value, in units of ‖A‖ ‖B‖


@dataclass(frozen=True)
class LayerFactors:
    """Independent A and B of one layer, in double precision on the CPU.

    Attributes:
        a: Mean of A, (rank, in_features).
        b: Mean of B, (out_features, rank).
        var_a: Variances of A, (rank, in_features).
        var_b: Variances of B, (out_features, rank).
        scaling: The factor in ΔW = scaling · B A.
        weight_stddev: Standard deviation of the frozen weight; None if unknown.
    """

    a: Tensor
    b: Tensor
    var_a: Tensor
    var_b: Tensor
    scaling: float
    weight_stddev: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ΔW: (out_features, in_features)."""
        return self.b.shape[0], self.a.shape[1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every element of ΔW, each (out_features, in_features).

        E ΔW = s E[B] E[A] and, for independent elements,
        Var ΔW_ij = s² Σ_k (E[B_ik]² Var A_kj + Var B_ik E[A_kj]² + Var B_ik Var A_kj). Both are
        exact, although ΔW is not Gaussian and its elements are not independent.
        """
        mean = self.scaling * self.b @ self.a
        second = self.b**2 + self.var_b
        variance = second @ self.var_a + self.var_b @ self.a**2
        return mean, self.scaling**2 * variance


def _factors(
    posterior: Posterior, mean: Mapping[str, Tensor], variance: Mapping[str, Tensor]
) -> dict[str, LayerFactors]:
    """Layer name -> factors, from mean and variance by site name."""
    found, scalings = {}, posterior.scalings
    for group in posterior.groups:
        a, b, var_a, var_b = (
            moment[site.name].cpu().double() for moment in (mean, variance) for site in group.sites
        )
        for i, (name, stddev) in enumerate(zip_longest(group.modules, group.weight_stddevs)):
            moments = a[i], b[i], var_a[i], var_b[i]
            found[name] = LayerFactors(*moments, scalings[group.key], stddev)
    return found


def posterior_factors(posterior: Posterior) -> dict[str, LayerFactors]:
    """Layer name -> its factors under q."""
    variance = {name: value.double() ** 2 for name, value in posterior.stddev.items()}
    return _factors(posterior, posterior.mean, variance)


def prior_factors(posterior: Posterior) -> dict[str, LayerFactors]:
    """Layer name -> its factors under the prior, averaged over the scales of a hierarchical one."""
    mean, variance = {}, posterior.prior_variances()
    for name, value in posterior.mean.items():
        mean[name] = posterior.prior_tensors.get(f"{name}.mean", torch.zeros_like(value))
        variance[name] = variance[name].expand(value.shape)
    return _factors(posterior, mean, variance)


def posterior_of(like: Posterior, layers: Mapping[str, LayerFactors]) -> Posterior:
    """A posterior with these factors by layer name, a guide of independent Normals and no prior.

    The factors have one scaling, and `like` gives base and revision. Layers of one shape and rank
    become one group.
    """
    by_shape: dict[tuple[int, int, int], dict[str, LayerFactors]] = {}
    for name, one in layers.items():
        by_shape.setdefault((*one.shape, one.a.shape[0]), {})[name] = one
    shapes = [shape[:2] for shape in by_shape]
    groups, mean, stddev = [], {}, {}
    for (out_features, in_features, rank), own in by_shape.items():
        stddevs = [one.weight_stddev for one in own.values() if one.weight_stddev is not None]
        suffix = f"_r{rank}" if shapes.count((out_features, in_features)) > 1 else ""
        group = Group(tuple(own), out_features, in_features, rank, tuple(stddevs), suffix)
        groups.append(group)
        mean[group.A.name] = torch.stack([one.a for one in own.values()]).float()
        mean[group.B.name] = torch.stack([one.b for one in own.values()]).float()
        stddev[group.A.name] = torch.stack([one.var_a for one in own.values()]).sqrt().float()
        stddev[group.B.name] = torch.stack([one.var_b for one in own.values()]).sqrt().float()
    scaling = next(iter(layers.values())).scaling
    return Posterior(
        like.base,
        tuple(groups),
        scaling * max(group.rank for group in groups),
        mean,
        stddev,
        Family(NO_PRIOR, {}, "normal"),
        revision=like.revision,
        unsuppressed=like.unsuppressed,
        language_map=like.language_map,
    )


def combine(
    posteriors: Sequence[Posterior],
    method: str = MEAN,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> tuple[Posterior, float]:
    """Combine posteriors that were fitted to one base and the same layers.

    - `mean` and `weighted`: ΔW = Σ w_i ΔW_i, with w_i = 1/K or as given (they need not sum to 1:
      1,1 adds the updates). Concatenated A and B of all runs, of rank Σ r_i, hold mean and spread
      exactly; a smaller rank keeps the first singular directions.
    - `product`: see `multiply`. It is no sum of low-rank matrices, so its first singular directions
      are kept, by default as many as the largest rank of the runs, without spread.

    Args:
        posteriors: Two or more.
        method: `product`, `mean` or `weighted`.
        weights: One per posterior, for `weighted`.
        rank: Rank of the result; None for the default above.

    Returns:
        The posterior, with a guide of independent Normals and no prior, and the share of the
        Frobenius norm of ΔW over all layers that it keeps.

    Raises:
        UserError: If the posteriors do not match, lack the spread or prior that `product` needs, or
            an option is invalid.
    """
    shares = _check(posteriors, method, weights)
    for number, other in enumerate(posteriors[1:], 2):
        check_alike(posteriors[0], other, ("run 1", f"run {number}"))
    allowed = tuple(sorted({token for one in posteriors for token in one.unsuppressed}))
    named = {name: one for some in posteriors[::-1] for name, one in some.language_map.items()}
    dependent = [number for number, one in enumerate(posteriors, 1) if one.independent]
    if dependent and method == PRODUCT:
        raise UserError(
            f"the weights of run {dependent[0]} depend on one another (prior "
            f"{posteriors[dependent[0] - 1].family.prior}), and a product takes them one by one; "
            "give method mean or weighted"
        )
    posteriors = [replace(one, unsuppressed=allowed, language_map=named) for one in posteriors]
    runs = [posterior_factors(one) for one in posteriors]
    largest = min(min(one.shape) for one in runs[0].values())
    if rank is not None and not 1 <= rank <= largest:
        raise UserError(f"rank is {rank}; give a number from 1 to {largest}")
    if method == PRODUCT:
        rank = max(one.rank for one in posteriors) if rank is None else rank
        return _product(posteriors, runs, rank)
    scaling = posteriors[0].scaling
    sums = {name: _sum([one[name] for one in runs], shares, scaling) for name in runs[0]}
    whole = posterior_of(posteriors[0], sums)
    if rank is None or rank >= whole.rank:
        return whole, 1.0
    return _first_directions(whole, rank)


def _sum(parts: Sequence[LayerFactors], weights: Sequence[float], scaling: float) -> LayerFactors:
    """Σ w_i ΔW_i of one layer, expressed at a scaling, with the directions of all."""
    rows = []
    for one, weight in zip(parts, weights, strict=True):
        c = math.sqrt(abs(weight) * one.scaling / scaling)
        signed = math.copysign(c, weight)
        rows.append((c * one.a, signed * one.b, c**2 * one.var_a, c**2 * one.var_b))
    a, b, var_a, var_b = zip(*rows, strict=True)
    moments = torch.cat(a, 0), torch.cat(b, 1), torch.cat(var_a, 0), torch.cat(var_b, 1)
    return LayerFactors(*moments, scaling, parts[0].weight_stddev)


def multiply(runs: Sequence[LayerFactors], priors: Sequence[LayerFactors]) -> Tensor:
    """Mean of the product of Gaussians over one layer's ΔW, with the prior counted once.

    If the K runs' data are independent given the weights, p(ΔW | D_1 ... D_K) is proportional to
    Π_i p(ΔW | D_i) / p(ΔW)^(K-1). In a Gaussian approximation, element by element, with means m_i
    and variances v_i of the posteriors and m0_i and v0_i of the priors:

        P    = Σ_i 1/v_i - (K-1)/K Σ_i 1/v0_i
        mean = (Σ_i m_i/v_i - (K-1)/K Σ_i m0_i/v0_i) / P

    If the priors differ, their geometric mean is counted once. There are three approximations: q
    replaces the posterior; ΔW = s B A is treated as Gaussian with independent elements (see
    `LayerFactors.moments`); and v_i is capped at v0_i, which it may exceed, unlike the variance of
    a Gaussian posterior, because the variance of a product grows with the means of its factors.
    So updates add up where the data said little, and are averaged by precision where they said
    much.

    Args:
        runs: The layer under each posterior.
        priors: The layer under each prior.

    Returns:
        (out_features, in_features), double precision.

    Raises:
        UserError: If an element has variance 0.
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


def _product(
    posteriors: Sequence[Posterior], runs: Sequence[Mapping[str, LayerFactors]], rank: int
) -> tuple[Posterior, float]:
    """The first singular directions of the product, as a point, and their share of the norm.

    It is made layer by layer, because all ΔW together are as large as the model.
    """
    priors = [prior_factors(one) for one in posteriors]
    scaling = posteriors[0].scaling
    found, squares, kept = {}, 0.0, 0.0
    for name, first in runs[0].items():
        delta = multiply([one[name] for one in runs], [one[name] for one in priors])
        u, values, vh = torch.linalg.svd(delta.float(), full_matrices=False)
        root = (values[:rank] / scaling).sqrt().double()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        zeros = torch.zeros_like(a), torch.zeros_like(b)
        found[name] = LayerFactors(a, b, *zeros, scaling, first.weight_stddev)
        squares += float(values.double().square().sum())
        kept += float(values[:rank].double().square().sum())
    return posterior_of(posteriors[0], found), _share(kept, squares)


def _first_directions(whole: Posterior, rank: int) -> tuple[Posterior, float]:
    """The first singular directions of a posterior, and their share of the norm."""
    found, keep = spectra(whole), {}
    for group, one in zip(whole.groups, found.values(), strict=True):
        a, b = (whole.mean[site.name].flatten(1).norm(dim=1) for site in group.sites)
        rounding = ROUNDING * whole.scaling * a * b  # what remains where runs cancel out
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
    """Check method and weights; return the weights of the sum."""
    count = len(posteriors)
    if method not in COMBINING_METHODS:
        raise UserError(f"method is '{method}'; give one of {', '.join(COMBINING_METHODS)}")
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


def check_alike(one: Posterior, other: Posterior, names: Sequence[str]) -> None:
    """Check that two posteriors, which errors call by `names`, have the same base and layers.

    Raises:
        UserError: If base, layers or frozen weights differ.
    """
    bases = [f"{p.base} (revision {p.revision})" if p.revision else p.base for p in (one, other)]
    if not is_same_place(one.base, other.base) or one.revision != other.revision:
        raise UserError(
            f"{names[0]} was fitted on {bases[0]}, {names[1]} on {bases[1]}; give runs of one base"
        )
    shapes, stddevs = zip(*(_layers(p.groups) for p in (one, other)), strict=True)
    if shapes[0] != shapes[1]:
        odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise UserError(
            f"{names[0]} adapts {len(shapes[0])} layers, {names[1]} {len(shapes[1])}, and they "
            f"differ in {len(odd)}, such as {odd[0]}; give runs with the same target modules"
        )
    for name in stddevs[0].keys() & stddevs[1].keys():
        if not math.isclose(stddevs[0][name], stddevs[1][name], rel_tol=SAME_WEIGHTS):
            raise UserError(
                f"{names[0]} and {names[1]} were fitted on other weights under one name, "
                f"{one.base} ({name} differs); give runs of one base"
            )


def _layers(groups: Sequence[Group]) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Shape, and where it is known the frozen weight's standard deviation, by layer name."""
    shapes: dict[str, tuple[int, int]] = {}
    stddevs: dict[str, float] = {}
    for group in groups:
        shapes |= dict.fromkeys(group.modules, (group.out_features, group.in_features))
        stddevs |= dict(zip(group.modules, group.weight_stddevs, strict=False))  # may be empty
    return shapes, stddevs
