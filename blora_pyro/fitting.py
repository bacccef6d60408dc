"""Stochastic variational inference: the loop that fits a guide to a model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from blora_pyro.data import Batch, Examples
from blora_pyro.guides import Guide
from blora_pyro.models import BLoRA, Temper, build_estimator

WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class Step:
    """What one step of SVI saw.

    Attributes:
        step: Counted from 1.
        loss: nll + beta · kl.
        nll: Mean negative log-likelihood of the batch's target tokens, nats.
        kl: KL(q || p) summed over every adapter weight, nats, to the rounding of loss / beta (for
            `point`: -log p; for `auto-normal`: a one-draw estimate). None with beta = 0, where the
            loss has no such part.
        lr: Learning rate of the step.
        tokens: Target tokens in the batch.
    """

    step: int
    loss: float
    nll: float
    kl: float | None
    lr: float
    tokens: int


class _Elbo(TraceMeanField_ELBO):
    """`TraceMeanField_ELBO` that remembers the likelihood term of its last trace."""

    nll: Tensor

    def _get_trace(self, model, guide, args, kwargs):
        traces = super()._get_trace(model, guide, args, kwargs)
        self.nll = -traces[0].nodes["tokens"]["log_prob_sum"].detach()
        return traces


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a half cosine to zero; `step` counts from 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches: a fresh permutation every epoch, the last batch of an epoch kept short."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        for chosen in order.split(batch_size):
            yield examples.batch(chosen.tolist())


def fit_guide(
    model: BLoRA,
    guide: Guide,
    examples: Examples,
    *,
    beta: float,
    lr: float,
    steps: int,
    batch_size: int,
    estimator: str = "shared",
    seed: int = 0,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Fit `guide` to `model` by SVI on `mean token NLL + beta · KL`, one weight draw a step.

    Adam without weight decay (which would ruin the means), gradients through the reparameterised
    draw. Pyro's global parameter store is left as it was.

    Args:
        model: The Pyro program.
        guide: An `nn.Module` with the model's arguments; moved to the model's device.
        examples: Training data.
        beta: Weight of the KL term.
        lr: Peak learning rate.
        steps: Number of steps.
        batch_size: Utterances a step.
        estimator: How the draw reaches the batch; one of `models.ESTIMATORS`.
        seed: Order of the data.
        on_step: Called after every step.

    Returns:
        One `Step` a step.

    Raises:
        FloatingPointError: If the loss is not finite.
        UserError: If there is no such estimator.
    """
    device = model.net.device
    temper = Temper(beta)
    tempered = temper(model), temper(guide)
    elbo, noise = _Elbo(), build_estimator(estimator)
    data = batches(examples, batch_size, seed)
    history: list[Step] = []
    try:
        with pyro.get_param_store().scope():
            assert isinstance(guide, nn.Module)
            guide.to(device)
            guide(examples.batch([0]).to(device))  # Pyro's own guides make their parameters here
            optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
            for step in range(steps):
                batch = next(data).to(device)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, lr)
                with noise:
                    loss = elbo.differentiable_loss(*tempered, batch)
                optimizer.zero_grad()
                loss.backward()
                value, nll = loss.item(), elbo.nll.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {step + 1}")
                optimizer.step()
                kl = (value - nll) / beta if beta else None
                rate = optimizer.param_groups[0]["lr"]
                history.append(Step(step + 1, value, nll, kl, rate, batch.num_tokens))
                on_step(history[-1])
    finally:
        model.adapters.clear()
    return history
