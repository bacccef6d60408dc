"""A smaller adapter: fewer directions of ΔW, or fewer elements of A and B."""

from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.posterior.posterior import Posterior
from blora_pyro.posterior.spectra import keep_directions, not_null, ratios, spectra


def prune(
    posterior: Posterior,
    *,
    rank: int | None = None,
    snr: float | None = None,
    sparsity: float | None = None,
) -> Posterior:
    """The posterior with fewer singular directions of E ΔW, or fewer elements of E A and E B.

    Give one of `rank`, `snr` and `sparsity`. The best approximation of a lower rank keeps the first
    directions (Eckart, Young 1936).

    Args:
        posterior: Of one domain. Its guide is replaced by independent Normals.
        rank: Number of singular values of E ΔW that every layer keeps, the largest ones.
        snr: Keep singular values above this many posterior standard deviations of uᵀ ΔW v.
        sparsity: Share of the elements of E A and E B, over all layers, to set to zero: those whose
            removal changes E ΔW least in the Frobenius norm, by `|A_kj| ‖B_:k‖` and `|B_ik| ‖A_k:‖`
            times the scaling. (Magnitude alone would remove B first, and with it all of ΔW, because
            B starts at zero and stays smaller than A.) Shapes and standard deviations stay.

    Raises:
        UserError: Unless exactly one is given, if nothing would be left, or if the posterior has
            several domains.
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
    keep = {}
    for key, spectrum in found.items():
        is_first = torch.arange(spectrum.values.shape[1]) < (rank or posterior.rank)
        keep[key] = not_null(spectrum) & is_first & (ratios(spectrum) > (snr or 0.0))
    if not any(mask.any() for mask in keep.values()):
        largest = max(float(ratios(spectrum).max()) for spectrum in found.values())
        raise UserError(f"snr {snr} leaves nothing; give less than {largest:.3g}, the largest")
    return keep_directions(posterior, found, keep)


def _zero_elements(posterior: Posterior, share: float) -> Posterior:
    """The posterior with those elements of its mean set to zero that change E ΔW least."""
    if not 0 <= share < 1:
        raise UserError(f"sparsity is {share:g}; give a share from 0 to below 1, such as 0.8")
    changes: dict[str, Tensor] = {}
    for group in posterior.groups:
        a, b = posterior.mean[group.A.name], posterior.mean[group.B.name]
        scaling = group.relative_scaling
        changes[group.A.name] = scaling * a.abs() * b.norm(dim=1)[:, :, None]
        changes[group.B.name] = scaling * b.abs() * a.norm(dim=2)[:, None, :]
    together = torch.cat([change.flatten() for change in changes.values()])
    is_zero = torch.zeros(len(together), dtype=torch.bool, device=together.device)
    is_zero[together.argsort(stable=True)[: round(share * len(together))]] = True
    masks = is_zero.split([change.numel() for change in changes.values()])
    mean = {
        name: posterior.mean[name].masked_fill(mask.view_as(posterior.mean[name]), 0.0)
        for name, mask in zip(changes, masks, strict=True)
    }
    return replace(posterior, mean=mean, state={}, fitted_alpha=None, weakened=None)
