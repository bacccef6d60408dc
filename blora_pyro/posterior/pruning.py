"""A smaller adapter from the posterior: fewer directions of ΔW, or fewer elements of A and B."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.spectra import Spectrum, spectra


def prune(
    posterior: Posterior,
    *,
    rank: int | None = None,
    snr: float | None = None,
    sparsity: float | None = None,
) -> Posterior:
    """The posterior with only some singular directions of E ΔW, or some elements of E A and E B.

    The best approximation of a lower rank keeps the first directions (Eckart, Young 1936).

    Args:
        posterior: What was fitted, of one domain. Its guide is replaced by independent Normals.
        rank: Keep the largest singular values of every layer's E ΔW, as many as this.
        snr: Keep those above this many posterior standard deviations of uᵀ ΔW v.
        sparsity: Set this share of the elements of E A and E B to zero: those, of all layers
            together, without which E ΔW changes least in the Frobenius norm, by |A_kj| ‖B_:k‖ and
            |B_ik| ‖A_k:‖ times the scaling. Magnitude alone would take B first, and with it all of
            ΔW, for B starts at zero and stays smaller than A. Shapes and spread stay.

    Raises:
        UserError: Unless just one is given, if nothing would be left, or of several domains.
    """
    if [rank, snr, sparsity].count(None) != 2:
        raise UserError("give one of rank, snr and sparsity to prune by")
    if posterior.pooling is not None:
        raise UserError("the posterior has several domains; choose one by for_domain")
    if sparsity is not None:
        return _zero_elements(posterior, sparsity)
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


def _zero_elements(posterior: Posterior, share: float) -> Posterior:
    """The posterior with the elements of its mean set to zero that change E ΔW least."""
    if not 0 <= share < 1:
        raise UserError(f"sparsity is {share:g}; give a share from 0 to below 1, such as 0.8")
    changes: dict[str, Tensor] = {}
    for group in posterior.groups:
        a, b = posterior.mean[group.A.name], posterior.mean[group.B.name]
        changes[group.A.name] = a.abs() * b.norm(dim=1)[:, :, None]
        changes[group.B.name] = b.abs() * a.norm(dim=2)[:, None, :]
    together = torch.cat([change.flatten() for change in changes.values()])
    is_zero = torch.zeros(len(together), dtype=torch.bool, device=together.device)
    is_zero[together.argsort(stable=True)[: round(share * len(together))]] = True
    masks = is_zero.split([change.numel() for change in changes.values()])
    mean = {
        name: posterior.mean[name].masked_fill(mask.view_as(posterior.mean[name]), 0.0)
        for name, mask in zip(changes, masks, strict=True)
    }
    return replace(posterior, mean=mean, state={})


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
