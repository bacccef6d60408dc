"""The strength of an adapter, chosen after the fit: from 0 (the base) to 1 (the fit)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blora_pyro.declarations import alternatives
from blora_pyro.errors import UserError
from blora_pyro.posterior.posterior import Posterior
from blora_pyro.posterior.spectra import Spectrum, keep_directions, not_null, ratios, spectra

SCALE, SIGNAL_TO_NOISE, BASE = "scale", "signal-to-noise", "base"
MAX_STRENGTH = {SCALE: 2.0, SIGNAL_TO_NOISE: 1.0, BASE: 1.0}  # 50 for 50% is a slip
RIDGE = 1e-3  # of the mean diagonal of the new domain's second moment
MAX_COUNT = 101  # strengths in a range
STRENGTHS = "give a number, some with commas between, or START:STOP:STEP such as 0:1:0.1"


@dataclass(frozen=True)
class Directions:
    """Directions of a layer's inputs, along which new domain and old languages are uncorrelated.

    With second moments C_new = P Pᵀ and C_old = P diag(ratios) Pᵀ the update of strength
    s = 1 / (1 + kappa) is

        ΔW C_new (C_new + kappa C_old)^-1 = ΔW P diag(s / (s + (1 - s) ratios)) P^-1 ,

    which minimises E_new ‖ΔW'x - ΔW x‖² + kappa E_old ‖ΔW'x‖². Where both hear the same (ratios of
    1) that is s ΔW; what the new domain hears alone stays, what old languages hear alone goes. A
    ridge on both moments makes them regular: directions that neither hears are scaled by s.

    Attributes:
        basis: P = L V, with C_new = L Lᵀ and V the eigenvectors of L^-1 C_old L^-T, (n, n).
        inverse: P^-1, (n, n).
        ratios: The eigenvalues, (n,).
    """

    basis: Tensor
    inverse: Tensor
    ratios: Tensor

    @classmethod
    def of(cls, new: Tensor, old: Tensor) -> "Directions":
        """Of E[x xᵀ] of a layer's inputs x in the new domain and in old languages, (n, n) both."""
        device = "cpu" if new.device.type == "mps" else new.device  # which has no doubles
        new, old = (one.to(device).double() for one in (new, old))
        size = new.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        ridge = RIDGE * size * torch.eye(len(new)).to(new)
        new, old = new + ridge, old + ridge
        lower = torch.linalg.cholesky(new)
        half = torch.linalg.solve_triangular(lower, old, upper=False)
        both = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        ratios, v = torch.linalg.eigh(both)
        inverse = torch.linalg.solve_triangular(lower.mT, v, upper=True).mT
        found = (lower @ v, inverse, ratios.clamp(min=0))
        return cls(*(one.float().cpu() for one in found))  # several n x n a layer are kept

    def weaken(self, a: Tensor, strength: float) -> Tensor:
        """Return the factor A (rank, n) of a strength above 0, of that of the fit."""
        shares = strength / (strength + (1 - strength) * self.ratios)
        weaker: Tensor = (a.float().cpu() @ self.basis * shares) @ self.inverse
        return weaker.to(a)


def at_strength(
    posterior: Posterior,
    strength: float | None,
    by: str = SCALE,
    directions: Mapping[str, Directions] | None = None,
) -> Posterior:
    """The posterior with a weaker or stronger update ΔW: 0 is exactly the base, 1 the fit.

    Strengths are those of the fit, whatever the strength of the posterior is: that of 0.5 at
    strength 0.5 is the same again, and at strength 1 it is the fit.

    Args:
        posterior: The fitted posterior, at any strength.
        strength: From 0 to 2 by `scale`, from 0 to 1 by the others; None leaves the posterior as it
            is.
        by: `scale` multiplies ΔW = alpha/rank · B A by the strength, through alpha: mean, draws,
            merge and the PEFT adapter follow exactly; guide and KL stay. (In weight space this is
            the line from base to fit: Wortsman et al., WiSE-FT, arXiv 2109.01903.)
            `signal-to-noise` keeps the fewest singular directions of E ΔW, over all layers, that
            hold this share of ‖E ΔW‖², in order of singular value over its standard deviation; the
            guide is replaced, see `spectra.keep_directions`. It selects directions, because
            elements of A and B are identified only up to A -> R⁻¹A, B -> BR, and by a share of
            ‖E ΔW‖², because few directions hold most of it. `base` takes from A what old
            languages hear, see `Directions`; variances follow, and the guide is replaced by
            independent Normals.
        directions: Of every layer, by its name, for `base`; see
            `runs.strength_curves.used_directions`.

    Raises:
        UserError: See `check_strength`; or if there are no directions for `base`.
    """
    check_strength(posterior, 1.0 if strength is None else strength, by)
    if strength is None:
        return posterior
    if posterior.fitted_alpha is not None:
        posterior = replace(posterior, alpha=posterior.fitted_alpha, fitted_alpha=None)
    if (fit := posterior.weakened) is not None:
        own = {name: value for name, value in fit._asdict().items() if name != "strength"}
        posterior = replace(posterior, **own, weakened=None)
    if strength == 1:
        return posterior
    if by == BASE and strength:
        if directions is None:
            raise UserError(
                f"strength_by is {by}, which asks the base what it hears of the fit's data, and "
                f"only evaluate, keep and fit with a contract do; give {SCALE}, or what keep writes"
            )
        return _weaker(posterior, strength, directions)
    if by in (SCALE, BASE):
        alpha = posterior.alpha
        return replace(posterior, alpha=strength * alpha, fitted_alpha=alpha or None)
    found = spectra(posterior)
    keep = _surest(found, strength)
    if not any(mask.any() for mask in keep.values()):
        return replace(posterior, alpha=0.0)
    return keep_directions(posterior, found, keep)


def _weaker(
    posterior: Posterior, strength: float, directions: Mapping[str, Directions]
) -> Posterior:
    """The posterior at a strength by `base`, above 0 and below 1."""
    mean, stddev = {}, {}
    for site in (group.A for group in posterior.groups):
        along = [directions[name] for name in site.modules]
        own, rows = posterior.stddev[site.name], None
        if coordinates := posterior.independent.get(site.name):  # A = z rows
            own, n = coordinates.stddev, site.shape[2]
            rows = coordinates.map(torch.eye(n, device=own.device).expand(site.shape[0], n, n))
        means, variances = [], []
        for i, (one, a) in enumerate(zip(along, posterior.mean[site.name], strict=True)):
            means.append(one.weaken(a, strength))
            if own.any():
                each = torch.eye(site.shape[2]).to(a) if rows is None else rows[i]
                variances.append(own[i] ** 2 @ one.weaken(each, strength) ** 2)
        mean[site.name] = torch.stack(means)
        stddev[site.name] = torch.stack(variances).sqrt() if variances else own
    return posterior.with_weaker(strength, mean, stddev)


def _surest(found: Mapping[str, Spectrum], share: float) -> dict[str, Tensor]:
    """Masks of the fewest directions, surest first, that hold a share of Σ values², by group."""
    surely = [torch.where(not_null(one), ratios(one), 0.0) for one in found.values()]
    pooled = torch.cat([part.flatten() for part in surely])
    order = pooled.argsort(descending=True, stable=True)[: int((pooled > 0).sum())]
    squares = torch.cat([one.values.flatten() for one in found.values()])[order].double() ** 2
    held = squares.cumsum(0) - squares  # by the directions before
    chosen = torch.zeros(len(pooled), dtype=torch.bool)
    chosen[order[held < share * squares.sum()]] = True
    masks = chosen.split([part.numel() for part in surely])
    return {key: mask.view_as(found[key].values) for key, mask in zip(found, masks, strict=True)}


def check_strength(posterior: Posterior, strength: float, by: str = SCALE) -> None:
    """Check the arguments of `at_strength`.

    Raises:
        UserError: If the strength is out of range, `by` is unknown or another than scale and the
            posterior has several domains, or is signal-to-noise and that is a point estimate.
    """
    if by not in MAX_STRENGTH:
        raise UserError(f"strength_by is '{by}'; give {alternatives([*MAX_STRENGTH])}")
    if not 0 <= strength <= MAX_STRENGTH[by]:
        raise UserError(
            f"strength is {strength:g}; give a number from 0 (the base) to {MAX_STRENGTH[by]:g}, "
            "where 1 is the fit"
        )
    if by != SCALE and posterior.pooling is not None:
        raise UserError(f"strength_by is {by}, and the run has several domains; give one as domain")
    if by == SIGNAL_TO_NOISE and not any(value.any() for value in posterior.stddev.values()):
        raise UserError(
            f"strength_by is {by}, but the adapter is a point estimate without spread; give {SCALE}"
        )


def parse_strengths(text: str) -> tuple[float, ...]:
    """Parse strengths: "0.5"; "0,0.5,1"; or START:STOP:STEP, ends included, such as "0:1:0.1".

    Raises:
        UserError: If the text has another form, or gives more than 101 strengths.
    """
    is_range = ":" in text
    try:
        numbers = [float(part) for part in text.split(":" if is_range else ",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)) or (is_range and len(numbers) != 3):
        raise UserError(f"strength is '{text}'; {STRENGTHS}")
    if not is_range:
        return tuple(dict.fromkeys(numbers))
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise UserError(f"strength is '{text}', which leads nowhere; {STRENGTHS}")
    steps = (stop - start) / step + 1e-9  # 0.3 / 0.1 is 2.9999999999999996
    if steps >= MAX_COUNT:
        raise UserError(f"strength is '{text}', more than {MAX_COUNT} of them; give a larger STEP")
    return tuple(round(start + place * step, 10) for place in range(math.floor(steps) + 1))
