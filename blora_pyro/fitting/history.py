"""The figures of the steps of a fit."""

from dataclasses import dataclass
from typing import Any


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
