"""How much of a fit is used: from the base (strength 0) to the fit (1), chosen after the fact."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import keep_directions, not_null, ratios
from blora_pyro.posterior.spectra import Spectrum, spectra

SCALE, SIGNAL_TO_NOISE = "scale", "signal-to-noise"
LARGEST = {SCALE: 2.0, SIGNAL_TO_NOISE: 1.0}  # beyond twice the update it is a slip: 50 for 50%
MANY = 101  # strengths of a range


def at_strength(posterior: Posterior, strength: float, by: str = SCALE) -> Posterior:
    """The posterior with its update ΔW made weaker, or stronger: 0 is exactly the base, 1 the fit.

    Args:
        posterior: What was fitted.
        strength: By `scale` from 0 to 2, by `signal-to-noise` from 0 to 1.
        by: `scale` multiplies ΔW = alpha/rank · B A by it, through alpha: mean, draws, merge and
            the PEFT adapter follow exactly, and guide and KL stay as they are. (Of the weights it
            is the line from base to fit: Wortsman et al., WiSE-FT, arXiv 2109.01903.)
            `signal-to-noise` keeps the singular directions of E ΔW, over all layers, that the
            posterior is surest of (highest singular value over its standard deviation), the fewest
            that hold this share of ‖E ΔW‖²; the guide is replaced, see `pruning.keep_directions`.
            Directions and not elements of A and B, since these are identified only up to
            A -> R⁻¹A, B -> BR. A share of ‖E ΔW‖² and not of the directions, since few hold most.

    Raises:
        UserError: See `check_strength`.
    """
    check_strength(posterior, strength, by)
    if strength == 1:
        return posterior
    if by == SCALE:
        return replace(posterior, alpha=strength * posterior.alpha)
    found = spectra(posterior)
    keep = _surest(found, strength)
    if not any(mask.any() for mask in keep.values()):
        return replace(posterior, alpha=0.0)
    return keep_directions(posterior, found, keep)


def _surest(found: Mapping[str, Spectrum], share: float) -> dict[str, Tensor]:
    """The fewest directions, by falling signal-to-noise, that hold a share of Σ values².

    Returns masks of (modules, rank) by group.
    """
    surely = [torch.where(not_null(one), ratios(one), 0.0) for one in found.values()]
    pooled = torch.cat([part.flatten() for part in surely])
    order = pooled.argsort(descending=True, stable=True)[: int((pooled > 0).sum())]
    squares = torch.cat([one.values.flatten() for one in found.values()])[order].double() ** 2
    held = squares.cumsum(0) - squares  # by those before
    chosen = torch.zeros(len(pooled), dtype=torch.bool)
    chosen[order[held < share * squares.sum()]] = True
    masks = chosen.split([part.numel() for part in surely])
    return {key: mask.view_as(found[key].values) for key, mask in zip(found, masks, strict=True)}


def check_strength(posterior: Posterior, strength: float, by: str = SCALE) -> None:
    """Refuse what `at_strength` can't do.

    Raises:
        UserError: If the strength is out of range, there is no such `by`, or the signal-to-noise of
            a point estimate, or of several domains, is asked for.
    """
    if by not in LARGEST:
        raise UserError(f"strength_by is '{by}'; give {' or '.join(LARGEST)}")
    if not 0 <= strength <= LARGEST[by]:
        raise UserError(
            f"strength is {strength:g}; give a number from 0 (the base) to {LARGEST[by]:g}, "
            "where 1 is the fit"
        )
    if by == SIGNAL_TO_NOISE and posterior.pooling is not None:
        raise UserError(f"strength_by is {by}, and the run has several domains; give one as domain")
    if by == SIGNAL_TO_NOISE and not any(value.any() for value in posterior.stddev.values()):
        raise UserError(
            f"strength_by is {by}, but the adapter is a point estimate without spread; give {SCALE}"
        )


def parse_strengths(text: str) -> tuple[float, ...]:
    """Strengths from text: "0.5"; "0,0.5,1"; or START:STOP:STEP with both ends, "0:1:0.1".

    Raises:
        UserError: If it is none of these, or names more than 101.
    """
    allowed = "give a number, some with commas between, or START:STOP:STEP such as 0:1:0.1"
    try:
        if ":" not in text:
            return tuple(dict.fromkeys(_number(part) for part in text.split(",")))
        start, stop, step = map(_number, text.split(":"))
    except ValueError:
        raise UserError(f"strength is '{text}'; {allowed}") from None
    if step <= 0 or stop < start:
        raise UserError(f"strength is '{text}', which leads nowhere; {allowed}")
    steps = (stop - start) / step + 1e-9  # 0.3 / 0.1 is 2.9999999999999996
    if steps >= MANY:
        raise UserError(f"strength is '{text}', more than {MANY} of them; give a larger STEP")
    return tuple(round(start + place * step, 10) for place in range(math.floor(steps) + 1))


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
