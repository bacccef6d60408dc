"""Singular values of ΔW and how sure the posterior is of them, without a ΔW."""

from dataclasses import dataclass

import torch
from torch import Tensor

from blora_pyro.posterior.posterior import Posterior


@dataclass(frozen=True)
class Spectrum:
    """Singular value decompositions of E ΔW of the layers of one group, in the rank's directions.

    Attributes:
        left: Left singular vectors, (modules, out_features, rank).
        values: Singular values, (modules, rank), falling.
        right: Right singular vectors, (modules, in_features, rank).
        stddevs: Posterior standard deviation of uᵀ ΔW v, (modules, rank).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    stddevs: Tensor


def spectra(posterior: Posterior) -> dict[str, Spectrum]:
    """The spectrum of every group, by its key, from QR factors of B and Aᵀ (no ΔW is built).

    The variance of uᵀ B A v = Σᵣ (uᵀB)ᵣ (A v)ᵣ for fixed u and v is exact for independent weights:
    Σᵣ Var(uᵀB)ᵣ E(A v)ᵣ² + E(uᵀB)ᵣ² Var(A v)ᵣ + Var(uᵀB)ᵣ Var(A v)ᵣ. (Under the horseshoe a rank's
    common width correlates them a little.)
    """
    found = {}
    for group in posterior.groups:
        a, b = (posterior.mean[site.name].cpu() for site in group.sites)
        var_a, var_b = (posterior.stddev[site.name].cpu() ** 2 for site in group.sites)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, values, vh = torch.linalg.svd(posterior.scaling * (r_b @ r_a.mT))
        left, right = q_b @ u, q_a @ vh.mT
        a_v, b_u = a @ right, b.mT @ left  # (modules, rank, directions)
        var_a_v, var_b_u = var_a @ right**2, var_b.mT @ left**2
        variance = (var_b_u * a_v**2 + b_u**2 * var_a_v + var_b_u * var_a_v).sum(1)
        stddevs = posterior.scaling * variance.sqrt()
        found[group.key] = Spectrum(left, values, right, stddevs)
    return found


def effective_rank(values: Tensor) -> Tensor:
    """Exp of the entropy of the shares of singular values in their sum, over the last dimension."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return (-torch.special.xlogy(shares, shares).sum(-1)).exp()
