"""What `run.json` keeps of the way of a fit: its steps, dev errors, and an alarm that ended it.

Nothing here imports torch, so that runs are listed at once.
"""

from dataclasses import asdict, dataclass
from typing import Any, TypedDict


@dataclass(frozen=True)
class Step:
    """The figures of one step of SVI.

    Attributes:
        step: Counted from 1.
        loss: nll + beta · kl + regularizer.
        nll: Mean negative log-likelihood of the batch's target tokens, nats.
        kl: KL(q || p) summed over every adapter weight, nats, to the rounding of loss / beta (for
            `point`: -log p; for `auto-normal`: a one-draw estimate). None with beta = 0, where the
            loss has no such part.
        lr: Learning rate of the step.
        tokens: Target tokens in the batch.
        regularizer: The weighted terms of distillation and EWC, nats; 0 without them.
        grad_norm: Norm of the gradient before it was clipped, all parameters together; None in a
            history that was stored without it.
    """

    step: int
    loss: float
    nll: float
    kl: float | None
    lr: float
    tokens: int
    regularizer: float = 0.0
    grad_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name, without the norm where it is not known."""
        return {k: v for k, v in vars(self).items() if k != "grad_norm" or v is not None}


@dataclass(frozen=True)
class DevError:
    """The posterior mean's error on the dev set.

    Attributes:
        step: Number of steps done.
        error: The main measure, as a fraction.
        forgetting: What the average error of the backward dev sets rose by, likewise; None where
            they are not watched.
        within_contract: The error that is expected at the strength which keeps the contract; None
            likewise.
    """

    step: int
    error: float
    forgetting: float | None = None
    within_contract: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name, without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class DevErrors(TypedDict):
    """What a fit with a dev set measured, as `run.json` stores it."""

    errors: list[DevError]
    best_step: int
    ended_by: str


class Ended(TypedDict):
    """What `run.json` stores of a fit that an alarm ended.

    Attributes:
        step: Steps done.
        kept_step: The step whose parameters the fit ends with; 0 is its start.
        reason: What went wrong, and what to turn, in a line.
    """

    step: int
    kept_step: int
    reason: str
