"""Singular values of ΔW and their posterior spread, computed without building a ΔW."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.posterior.posterior import Posterior


@dataclass(frozen=True)
class Spectrum:
    """Singular value decompositions of E ΔW for the layers of one group.

    Attributes:
        left: Left singular vectors, (modules, out_features, rank).
        values: Singular values, (modules, rank), in descending order.
        right: Right singular vectors, (modules, in_features, rank).
        stddevs: Posterior standard deviation of uᵀ ΔW v, (modules, rank).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    stddevs: Tensor


def spectra(posterior: Posterior) -> dict[str, Spectrum]:
    """The spectrum of every group, by group key, from QR factors of B and Aᵀ.

    The variance of uᵀ B A v = Σᵣ (uᵀB)ᵣ (A v)ᵣ for fixed u and v is exact for independent weights:
    Σᵣ Var(uᵀB)ᵣ E(A v)ᵣ² + E(uᵀB)ᵣ² Var(A v)ᵣ + Var(uᵀB)ᵣ Var(A v)ᵣ, and so it is where A or B is
    a map of independent coordinates, see `Posterior.independent`. (Under the horseshoe the scale
    that a rank shares correlates them slightly.)
    """
    found, scalings = {}, posterior.scalings
    for group in posterior.groups:
        scaling = scalings[group.key]
        a, b = (posterior.mean[site.name].cpu() for site in group.sites)
        var_a, var_b = (posterior.stddev[site.name].cpu() ** 2 for site in group.sites)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, values, vh = torch.linalg.svd(scaling * (r_b @ r_a.mT))
        left, right = q_b @ u, q_a @ vh.mT
        a_v, b_u = a @ right, b.mT @ left  # (modules, rank, directions)
        along = right
        if coordinates := posterior.independent.get(group.A.name):
            var_a, along = coordinates.stddev.cpu() ** 2, coordinates.map.adjoint(right)
        across = left
        if coordinates := posterior.independent.get(group.B.name):
            var_b, across = coordinates.stddev.cpu() ** 2, coordinates.map.adjoint(left)
        var_a_v, var_b_u = var_a @ along**2, var_b.mT @ across**2
        variance = (var_b_u * a_v**2 + b_u**2 * var_a_v + var_b_u * var_a_v).sum(1)
        stddevs = scaling * variance.sqrt()
        found[group.key] = Spectrum(left, values, right, stddevs)
    return found


def effective_rank(values: Tensor) -> Tensor:
    """Effective rank of singular values (..., rank): exp of the entropy of their shares, (...)."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return (-torch.special.xlogy(shares, shares).sum(-1)).exp()


def keep_directions(
    posterior: Posterior, found: Mapping[str, Spectrum], keep: Mapping[str, Tensor]
) -> Posterior:
    """The posterior with only the chosen singular directions of E ΔW.

    A and B are transformed into the basis of the singular value decomposition
    scaling · E B E A = U S Vᵀ: B -> B M, A -> N A, with means U (S/scaling)^½ and (S/scaling)^½ Vᵀ,
    and variances through M² and N². Layers that keep no direction are dropped; layers of one shape
    that keep different numbers are split into groups.

    The guide is replaced by independent Normals, and a prior that is an earlier posterior is
    dropped, because it is in the old basis.

    Args:
        posterior: The posterior.
        found: Its `spectra`.
        keep: Masks of the directions to keep, (modules, rank), by group; at least one in all, and
            none that is null, see `not_null`.
    """
    groups: list[Group] = []
    mean: dict[str, Tensor] = {}
    stddev: dict[str, Tensor] = {}
    for group in posterior.groups:
        counts = keep[group.key].sum(1).tolist()
        moments = _rotate(posterior, group, found[group.key], keep[group.key])
        for kept in sorted(set(counts) - {0}):
            chosen = [i for i, count in enumerate(counts) if count == kept]
            stddevs = group.weight_stddevs
            part = replace(
                group,
                modules=tuple(group.modules[i] for i in chosen),
                rank=kept,
                weight_stddevs=tuple(stddevs[i] for i in chosen) if stddevs else (),
                suffix=f"{group.suffix}_r{kept}",  # keeps keys unique when pruned again
            )
            groups.append(part)
            for site, (site_mean, site_variance) in zip(part.sites, moments, strict=True):
                inner = (slice(kept),) if site.factor == "A" else (slice(None), slice(kept))
                mean[site.name] = site_mean[chosen][:, *inner].contiguous()
                stddev[site.name] = site_variance[chosen][:, *inner].sqrt().contiguous()
    alpha = posterior.scaling * max(group.rank for group in groups)
    kept_part = replace(posterior, groups=tuple(groups), alpha=alpha, mean=mean, stddev=stddev)
    return replace(kept_part, state={}, prior_tensors={}, fitted_alpha=None, weakened=None)


def ratios(spectrum: Spectrum) -> Tensor:
    """Singular value over its standard deviation, (modules, rank); 0 where both are 0."""
    return torch.where(spectrum.values > 0, spectrum.values / spectrum.stddevs, 0.0)


def not_null(spectrum: Spectrum) -> Tensor:
    """Mask of the singular values that are not rounding errors of 0, (modules, rank)."""
    return spectrum.values > 1e-6 * spectrum.values[:, :1]


def _rotate(
    posterior: Posterior, group: Group, spectrum: Spectrum, keep: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of A and of B in the singular basis, kept directions first."""
    a, b = (posterior.mean[site.name].cpu().double() for site in group.sites)
    var_a, var_b = (posterior.stddev[site.name].cpu().double() ** 2 for site in group.sites)
    order = (~keep).int().argsort(dim=1, stable=True)[:, None]
    values = spectrum.values[:, None].gather(2, order)
    left = spectrum.left.gather(2, order.expand_as(spectrum.left)).double()
    right = spectrum.right.gather(2, order.expand_as(spectrum.right)).double()
    root = (values.double() / posterior.scalings[group.key]).sqrt()
    mean_b, mean_a = left * root, (right * root).mT
    m = torch.linalg.pinv(b, rtol=1e-6) @ mean_b
    n = mean_a @ torch.linalg.pinv(a, rtol=1e-6)
    pairs = (mean_a, n**2 @ var_a), (mean_b, var_b @ m**2)
    return [(mean.float(), variance.float()) for mean, variance in pairs]
