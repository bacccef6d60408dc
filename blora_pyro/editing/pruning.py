"""A smaller adapter from the posterior: the directions of ΔW that it is sure of."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.spectra import Spectrum, spectra


def prune(posterior: Posterior, *, rank: int | None = None, snr: float | None = None) -> Posterior:
    """The posterior with only some singular directions of every layer's E ΔW.

    The best approximation of a lower rank keeps the first directions (Eckart, Young 1936).

    Args:
        posterior: What was fitted. Its guide is replaced, see `keep_directions`.
        rank: Keep the largest singular values, as many as this, in every layer.
        snr: Keep those above this many posterior standard deviations of uᵀ ΔW v.

    Raises:
        UserError: If neither or both are given, or nothing would be left.
    """
    if (rank is None) == (snr is None):
        raise UserError("give either rank or snr to prune by")
    if rank is not None and not 1 <= rank <= posterior.rank:
        raise UserError(f"rank is {rank}; give a number from 1 to {posterior.rank}")
    if snr is not None and not snr > 0:
        raise UserError(f"snr is {snr}; give a number above 0")
    found = spectra(posterior)
    keep = {key: _directions(spectrum, rank, snr) for key, spectrum in found.items()}
    if not any(mask.any() for mask in keep.values()):
        largest = max(float(ratios(spectrum).max()) for spectrum in found.values())
        raise UserError(f"snr {snr} leaves nothing; give less than {largest:.3g}, the largest")
    return keep_directions(posterior, found, keep)


def keep_directions(
    posterior: Posterior, found: Mapping[str, Spectrum], keep: Mapping[str, Tensor]
) -> Posterior:
    """The posterior with only the chosen singular directions, one or more, of E ΔW.

    A and B are turned into the basis of the singular value decomposition scaling · E B E A = U S Vᵀ
    (B -> B M, A -> N A with means U (S/scaling)^½ and (S/scaling)^½ Vᵀ, variances through M² and
    N²). Layers that keep none are left out; layers of one shape and different ranks become groups
    of their own.

    Args:
        posterior: What was fitted. Its guide is replaced by independent Normals, and a prior that
            is an earlier posterior is gone, for it is in the old basis.
        found: Its `spectra`.
        keep: Which directions, (modules, rank), likewise by group; none of them null.
    """
    groups: list[Group] = []
    mean: dict[str, Tensor] = {}
    stddev: dict[str, Tensor] = {}
    for group in posterior.groups:
        counts = keep[group.key].sum(1).tolist()
        moments = _rotate(posterior, group, found[group.key], keep[group.key])
        for kept in sorted(set(counts) - {0}):
            chosen = [i for i, count in enumerate(counts) if count == kept]
            part = _part(group, chosen, kept)
            groups.append(part)
            for site, (site_mean, site_variance) in zip(part.sites, moments, strict=True):
                inner = (slice(kept),) if site.factor == "A" else (slice(None), slice(kept))
                mean[site.name] = site_mean[chosen][:, *inner].contiguous()
                stddev[site.name] = site_variance[chosen][:, *inner].sqrt().contiguous()
    alpha = posterior.scaling * max(group.rank for group in groups)
    return replace(
        posterior,
        groups=tuple(groups),
        alpha=alpha,
        mean=mean,
        stddev=stddev,
        state={},
        prior_tensors={},
    )


def ratios(spectrum: Spectrum) -> Tensor:
    """Singular value over standard deviation, (modules, rank); 0 where both are."""
    return torch.where(spectrum.values > 0, spectrum.values / spectrum.stddevs, 0.0)


def not_null(spectrum: Spectrum) -> Tensor:
    """Which singular values are no rounding errors of 0, (modules, rank)."""
    return spectrum.values > 1e-6 * spectrum.values[:, :1]


def _directions(spectrum: Spectrum, rank: int | None, snr: float | None) -> Tensor:
    """Which directions each layer keeps, (modules, rank)."""
    if rank is not None:
        return not_null(spectrum) & (torch.arange(spectrum.values.shape[1]) < rank)
    assert snr is not None
    return not_null(spectrum) & (ratios(spectrum) > snr)


def _rotate(
    posterior: Posterior, group: Group, spectrum: Spectrum, keep: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of A and of B in the singular basis, directions that are kept first."""
    a, b = (posterior.mean[site.name].cpu().double() for site in group.sites)
    var_a, var_b = (posterior.stddev[site.name].cpu().double() ** 2 for site in group.sites)
    order = (~keep).int().argsort(dim=1, stable=True)[:, None]
    values = spectrum.values[:, None].gather(2, order)
    left = spectrum.left.gather(2, order.expand_as(spectrum.left)).double()
    right = spectrum.right.gather(2, order.expand_as(spectrum.right)).double()
    root = (values.double() / posterior.scaling).sqrt()
    mean_b, mean_a = left * root, (right * root).mT
    m = torch.linalg.pinv(b, rtol=1e-6) @ mean_b
    n = mean_a @ torch.linalg.pinv(a, rtol=1e-6)
    pairs = (mean_a, n**2 @ var_a), (mean_b, var_b @ m**2)
    return [(mean.float(), variance.float()) for mean, variance in pairs]


def _part(group: Group, chosen: list[int], rank: int) -> Group:
    """Some layers of a group, at another rank."""
    stddevs = group.weight_stddevs
    return replace(
        group,
        modules=tuple(group.modules[i] for i in chosen),
        rank=rank,
        weight_stddevs=tuple(stddevs[i] for i in chosen) if stddevs else (),
        suffix=f"{group.suffix}_r{rank}",  # pruned again, groups of one shape stay apart
    )
