"""The learning rate of every step: a linear warm-up to its peak, and what comes then."""

import math

from blora_pyro.options import Schedule, default_warmup_steps


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    schedule: Schedule = "cosine",
    warmup_steps: int | None = None,
) -> float:
    """The rate of one step.

    Args:
        step: Counted from 0.
        steps: All there are.
        peak: The highest rate, that of the last step of the warm-up.
        schedule: From there half a `cosine` or a `linear` slope to zero, or `constant`.
        warmup_steps: Steps of the linear warm-up; 0 is none, None `default_warmup_steps`.
    """
    warm_up = default_warmup_steps(steps) if warmup_steps is None else warmup_steps
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
