"""Separately fitted runs made into one adapter, on the level of ΔW.

A and B are identified only up to A -> R⁻¹A, B -> BR, so those of separate fits can't be averaged
element by element; ΔW = alpha/rank · B A can.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.chains import SAME_WEIGHTS, is_same_place
from blora_pyro.diagnostics import prior_variances
from blora_pyro.errors import UserError
from blora_pyro.families import NO_PRIOR, Family
from blora_pyro.posterior import Posterior
from blora_pyro.pruning import keep_directions, not_null
from blora_pyro.spectra import spectra

PRODUCT, MEAN, WEIGHTED = METHODS = ("product", "mean", "weighted")
ROUNDING = 1e-6  # of a singular value, in units of ‖A‖ ‖B‖


@dataclass(frozen=True)
class Factors:
    """Independent A and B of one layer, in double precision on the CPU.

    Attributes:
        a: Mean of A, (rank, in_features).
        b: Mean of B, (out_features, rank).
        var_a: Variances of A, likewise.
        var_b: Variances of B, likewise.
        scaling: Of ΔW = scaling · B A.
        weight_stddev: Standard deviation of the frozen weight; None if it is not known.
    """

    a: Tensor
    b: Tensor
    var_a: Tensor
    var_b: Tensor
    scaling: float
    weight_stddev: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW: (out_features, in_features)."""
        return self.b.shape[0], self.a.shape[1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every element of ΔW, each (out_features, in_features).

        E ΔW = s E[B] E[A] and, of independent elements,
        Var ΔW_ij = s² Σ_k (E[B_ik]² Var A_kj + Var B_ik E[A_kj]² + Var B_ik Var A_kj). Both are
        exact; that ΔW is Gaussian, and its elements independent of one another, is not.
        """
        mean = self.scaling * self.b @ self.a
        second = self.b**2 + self.var_b
        variance = second @ self.var_a + self.var_b @ self.a**2
        return mean, self.scaling**2 * variance

    def times(self, weight: float, scaling: float) -> "Factors":
        """The factors of weight · ΔW, at another scaling."""
        c = math.sqrt(abs(weight) * self.scaling / scaling)
        sign = math.copysign(1.0, weight)
        return replace(
            self,
            a=c * self.a,
            b=sign * c * self.b,
            var_a=c**2 * self.var_a,
            var_b=c**2 * self.var_b,
            scaling=scaling,
        )


def factors_of(
    posterior: Posterior, mean: Mapping[str, Tensor], variance: Mapping[str, Tensor]
) -> Iterator[tuple[str, Factors]]:
    """(layer name, its factors) by moments of sites, those of the posterior or of its prior."""
    for group in posterior.groups:
        a, b, var_a, var_b = (
            moment[site.name].cpu().double() for moment in (mean, variance) for site in group.sites
        )
        for i, name in enumerate(group.modules):
            stddev = group.weight_stddevs[i] if group.weight_stddevs else None
            yield name, Factors(a[i], b[i], var_a[i], var_b[i], posterior.scaling, stddev)


def posterior_factors(posterior: Posterior) -> dict[str, Factors]:
    """The factors of every layer under q."""
    variance = {name: value.double() ** 2 for name, value in posterior.stddev.items()}
    return dict(factors_of(posterior, posterior.mean, variance))


def prior_factors(posterior: Posterior) -> dict[str, Factors]:
    """The factors of every layer under the prior, the scales of a hierarchical one averaged over.

    Raises:
        UserError: If there is no prior, or it is code.
    """
    variance = {
        name: value.expand(posterior.mean[name].shape)
        for name, value in prior_variances(posterior).items()
    }
    carried = posterior.prior_tensors
    mean = {
        name: carried.get(f"{name}.mean", torch.zeros_like(value))
        for name, value in posterior.mean.items()
    }
    return dict(factors_of(posterior, mean, variance))


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
    whole = _posterior(posteriors[0], found)
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
    return _posterior(like, found), _share(kept, squares)


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


def _posterior(like: Posterior, layers: Mapping[str, Factors]) -> Posterior:
    """A posterior of layers with these factors, all of one scaling; no guide, no prior."""
    by_shape: dict[tuple[int, int, int], list[str]] = {}
    for name, one in layers.items():
        by_shape.setdefault((*one.shape, one.a.shape[0]), []).append(name)
    shapes = [shape[:2] for shape in by_shape]
    groups, mean, stddev = [], {}, {}
    for (out_features, in_features, rank), names in by_shape.items():
        stddevs = [layers[name].weight_stddev for name in names]
        group = Group(
            tuple(names),
            out_features,
            in_features,
            rank,
            tuple(one for one in stddevs if one is not None),
            f"_r{rank}" if shapes.count((out_features, in_features)) > 1 else "",
        )
        groups.append(group)
        own = [layers[name] for name in names]
        mean[group.A.name] = torch.stack([one.a for one in own]).float()
        mean[group.B.name] = torch.stack([one.b for one in own]).float()
        stddev[group.A.name] = torch.stack([one.var_a for one in own]).sqrt().float()
        stddev[group.B.name] = torch.stack([one.var_b for one in own]).sqrt().float()
    scaling = next(iter(layers.values())).scaling
    return Posterior(
        like.base,
        tuple(groups),
        scaling * max(group.rank for group in groups),
        mean,
        stddev,
        Family(NO_PRIOR, {}, "normal"),
        revision=like.revision,
    )


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
