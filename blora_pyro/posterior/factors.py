"""A and B of one layer, apart from the groups that layers of one shape are stacked in."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.families import NO_PRIOR, Family


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
        for name, value in posterior.prior_variances().items()
    }
    carried = posterior.prior_tensors
    mean = {
        name: carried.get(f"{name}.mean", torch.zeros_like(value))
        for name, value in posterior.mean.items()
    }
    return dict(factors_of(posterior, mean, variance))


def posterior_of(like: Posterior, layers: Mapping[str, Factors]) -> Posterior:
    """A posterior of layers with these factors; no guide, no prior.

    Args:
        like: Whose base and revision it has.
        layers: Layer name -> its factors, all of one scaling; those of one shape and rank become
            one group.
    """
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
