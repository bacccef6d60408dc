"""Stochastic variational inference: the loop that fits a guide to a model."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from blora_pyro.checkpoints import Checkpoint, Checkpoints, RandomState
from blora_pyro.data import Batch, Examples, batch_indices
from blora_pyro.errors import UserError
from blora_pyro.guides import Guide
from blora_pyro.models import BLoRA, Temper, build_estimator

WARM_UP_SHARE = 0.1
MAX_SKIPPED = 10  # steps in a row


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


def batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    start: int = 0,
    weights: Sequence[float] | None = None,
) -> Iterator[Batch]:
    """Endless batches, in the order of `batch_indices`.

    The order depends on `seed` alone; `start` leaves out the first batches without making them.
    """
    order = batch_indices(examples.sources, batch_size, seed, weights)
    return map(examples.batch, islice(order, start, None))


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
    weights: Sequence[float] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
) -> list[Step]:
    """Fit `guide` to `model` by SVI on `mean token NLL + beta · KL`, one weight draw a step.

    Adam without weight decay (which would ruin the means), gradients through the reparameterised
    draw. Pyro's global parameter store is left as it was.

    A step whose loss or gradient is not finite is skipped: the weights stay, its batch is passed
    over, and it is not in the history. The fit does not end on such a step, but tries further
    batches; it stops at ten in a row.

    From a checkpoint it goes on bit by bit as if never interrupted, on the same machine with the
    same number of threads. All that counts of a guide is its `state_dict`.

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
        weights: Of the sources of `examples`, see `batch_indices`.
        on_step: Called after every step.
        checkpoints: Where to go on from, and what to write on the way.

    Returns:
        One `Step` a step.

    Raises:
        FloatingPointError: If loss or gradient are not finite ten times in a row.
        UserError: If there is no such estimator, or the checkpoint is damaged or of another fit.
        OSError: If a checkpoint can't be written.
        Interrupted: If a signal has come; a checkpoint has been written.
    """
    assert isinstance(guide, nn.Module)
    device, noise = model.net.device, build_estimator(estimator)
    try:
        with pyro.get_param_store().scope(), _without_nan_warnings():
            guide.to(device)
            guide(examples.batch([0]).to(device))  # Pyro's own guides make their parameters here
            loop = _Loop(model, guide, beta, lr, steps, noise, checkpoints or Checkpoints(None))
            data = batches(examples, batch_size, seed, loop.done, weights)
            while not loop.finished:
                if step := loop.step(next(data).to(device)):
                    on_step(step)
    finally:
        model.adapters.clear()
    return loop.history


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Keep Pyro from warning of what is counted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


class _Loop:
    """SVI between two steps: all that the next ones depend on.

    Attributes:
        done: Steps behind us, the skipped ones among them.
        skipped: How many were skipped last, in a row.
        history: Those that were not.
    """

    def __init__(
        self,
        model: BLoRA,
        guide: nn.Module,
        beta: float,
        lr: float,
        steps: int,
        noise: Messenger,
        checkpoints: Checkpoints,
    ) -> None:
        """At the first step, or where the checkpoint is."""
        temper = Temper(beta)
        self.programs = temper(model), temper(guide)
        self.guide, self.elbo, self.noise = guide, _Elbo(), noise
        self.beta, self.lr, self.steps = beta, lr, steps
        self.device = model.net.device
        self.optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
        self.done, self.skipped = 0, 0
        self.history: list[Step] = []
        self.checkpoints = checkpoints
        if checkpoint := checkpoints.read():
            self._restore(checkpoint)

    @property
    def finished(self) -> bool:
        """All steps are done, and the last loss was finite."""
        return self.done >= self.steps and not self.skipped

    def step(self, batch: Batch) -> Step | None:
        """One step of SVI; None if it is skipped, or only tried after the last.

        A checkpoint is written once the loss of the step after it is known to be finite, and so
        never of weights that have gone astray.
        """
        interrupts = self.checkpoints.interrupts
        stop = interrupts.caught is not None
        wanted = stop or self.checkpoints.due(self.done)
        before = self._state() if wanted else None
        value, nll = self._gradients(batch)
        if before and math.isfinite(value):
            self.checkpoints.write(before)
        if stop:
            interrupts.answer()
        if not math.isfinite(value):
            self._skip(value)
            return None
        self.skipped = 0
        return self._update(value, nll, batch.num_tokens) if self.done < self.steps else None

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Loss (or the gradients' norm, if that is not finite) and NLL; leaves the gradients."""
        try:
            with self.noise:
                loss = self.elbo.differentiable_loss(*self.programs, batch)
        except ValueError as error:
            if "found invalid values" not in str(error):
                raise
            return math.nan, math.nan  # so say distributions whose parameters are not finite
        value, nll = loss.item(), self.elbo.nll.item()
        if not math.isfinite(value):
            return value, nll
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.guide.parameters(), math.inf).item()  # clips nothing
        return (value if math.isfinite(norm) else norm), nll

    def _update(self, loss: float, nll: float, tokens: int) -> Step:
        rate = learning_rate(self.done, self.steps, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        kl = (loss - nll) / self.beta if self.beta else None
        self.history.append(Step(self.done, loss, nll, kl, rate, tokens))
        return self.history[-1]

    def _skip(self, value: float) -> None:
        self.done = min(self.done + 1, self.steps)
        self.skipped += 1
        if self.skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient is {value} at step {self.done}, and was not finite "
                f"{MAX_SKIPPED} times in a row"
            )

    def _state(self) -> Checkpoint:
        random = RandomState.now(self.device)
        tensors = {f"guide.{name}": value for name, value in self.guide.state_dict().items()}
        names = [name for name, _ in self.guide.named_parameters()]
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{slot}.{names[index]}": value for slot, value in slots.items()}
        about = {"random": random.about, "history": [vars(step) for step in self.history]}
        return Checkpoint.copy(self.done, tensors | random.tensors, about)

    def _restore(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        names = [name for name, _ in self.guide.named_parameters()]
        slots: dict[int, dict[str, Tensor]] = {}
        try:
            self.guide.load_state_dict(parts["guide"])
            for key, value in parts.get("adam", {}).items():
                slot, _, name = key.partition(".")
                slots.setdefault(names.index(name), {})[slot] = value.clone()
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
            self.history = [Step(**step) for step in checkpoint.about["history"]]
            RandomState.restore(checkpoint, self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint does not fit the guide ({why}); bring back what was changed, or "
                "start again with --overwrite"
            ) from None
        self.done = checkpoint.step
