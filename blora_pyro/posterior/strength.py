"""The strength of an adapter, chosen after the fit: from 0 (the base) to 1 (the fit)."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.posterior.posterior import Posterior
from blora_pyro.posterior.spectra import Spectrum, keep_directions, not_null, ratios, spectra

SCALE, SIGNAL_TO_NOISE = "scale", "signal-to-noise"
MAX_STRENGTH = {SCALE: 2.0, SIGNAL_TO_NOISE: 1.0}  # more than 2 is a slip, such as 50 for 50%
MAX_COUNT = 101  # strengths in a range
STRENGTHS = "give a number, some with commas between, or START:STOP:STEP such as 0:1:0.1"


def at_strength(posterior: Posterior, strength: float | None, by: str = SCALE) -> Posterior:
    """The posterior with a weaker or stronger update ΔW: 0 is exactly the base, 1 the fit.

    Strengths are those of the fit, whatever the strength of the posterior is: that of 0.5 at
    strength 0.5 is the same again, and at strength 1 it is the fit.

    Args:
        posterior: The fitted posterior, at any strength.
        strength: From 0 to 2 by `scale`, from 0 to 1 by `signal-to-noise`; None leaves the
            posterior as it is.
        by: `scale` multiplies ΔW = alpha/rank · B A by the strength, through alpha: mean, draws,
            merge and the PEFT adapter follow exactly; guide and KL stay. (In weight space this is
            the line from base to fit: Wortsman et al., WiSE-FT, arXiv 2109.01903.)
            `signal-to-noise` keeps the fewest singular directions of E ΔW, over all layers, that
            hold this share of ‖E ΔW‖², in order of singular value over its standard deviation; the
            guide is replaced, see `spectra.keep_directions`. It selects directions, because
            elements of A and B are identified only up to A -> R⁻¹A, B -> BR, and by a share of
            ‖E ΔW‖², because few directions hold most of it.

    Raises:
        UserError: See `check_strength`.
    """
    check_strength(posterior, 1.0 if strength is None else strength, by)
    if strength is None:
        return posterior
    if posterior.fitted_alpha is not None:
        posterior = replace(posterior, alpha=posterior.fitted_alpha, fitted_alpha=None)
    if strength == 1:
        return posterior
    if by == SCALE:
        alpha = posterior.alpha
        return replace(posterior, alpha=strength * alpha, fitted_alpha=alpha or None)
    found = spectra(posterior)
    keep = _surest(found, strength)
    if not any(mask.any() for mask in keep.values()):
        return replace(posterior, alpha=0.0)
    return keep_directions(posterior, found, keep)


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
        UserError: If the strength is out of range, `by` is unknown, or `by` is signal-to-noise and
            the posterior is a point estimate or has several domains.
    """
    if by not in MAX_STRENGTH:
        raise UserError(f"strength_by is '{by}'; give {' or '.join(MAX_STRENGTH)}")
    if not 0 <= strength <= MAX_STRENGTH[by]:
        raise UserError(
            f"strength is {strength:g}; give a number from 0 (the base) to {MAX_STRENGTH[by]:g}, "
            "where 1 is the fit"
        )
    if by == SIGNAL_TO_NOISE and posterior.pooling is not None:
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
