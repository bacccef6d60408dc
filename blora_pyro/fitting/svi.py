"""One step of stochastic variational inference after another, and what the next ones depend on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blora_pyro.data import Batch, StreamPosition
from blora_pyro.errors import UserError
from blora_pyro.fitting.augmentation import SpecAugment
from blora_pyro.fitting.averaging import Average
from blora_pyro.fitting.checkpoints import Checkpoint, Checkpoints, RandomState
from blora_pyro.fitting.objective import Objective
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.schedules import Schedule, learning_rate
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.models import WhisperProgram, build_estimator

MAX_SKIPPED = 10  # steps in a row


@dataclass(frozen=True)
class SviOptions:
    """How a guide is fitted.

    Attributes:
        beta: Weight of the KL term.
        lr: Peak learning rate.
        steps: Number of steps.
        batch_size: Utterances a step.
        schedule: Of the learning rate, after its warm-up; see `learning_rate`.
        warmup_steps: Steps to the peak; None is a tenth.
        estimator: How the draw reaches the batch; one of `models.ESTIMATORS`.
        gradient_accumulation: Micro-batches that a step's batch is taken in; see `Objective`.
        max_grad_norm: Clip the gradient to this norm, all parameters together; None does not.
        spec_augment: Mask the features; see `SpecAugment`.
        seed: Order of the data.
        weights: Of the sources of the examples, see `batch_indices`.
        average_from: Share of the steps after which the guide's parameters are averaged over the
            steps, see `Average`; None takes those of the last step.
    """

    beta: float
    lr: float
    steps: int
    batch_size: int
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    estimator: str = "shared"
    gradient_accumulation: int = 1
    max_grad_norm: float | None = None
    spec_augment: bool = False
    seed: int = 0
    weights: Sequence[float] | None = None
    average_from: float | None = None


@dataclass(frozen=True)
class Step:
    """What one step of SVI saw.

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
    """

    step: int
    loss: float
    nll: float
    kl: float | None
    lr: float
    tokens: int
    regularizer: float = 0.0


class Loop:
    """SVI between two steps: all that the next ones depend on.

    Attributes:
        done: Steps behind us, the skipped ones among them.
        skipped: How many were skipped last, in a row.
        history: Those that were not.
        place: Where a stream goes on; None is its beginning.
    """

    def __init__(
        self,
        model: WhisperProgram,
        guide: Any,
        options: SviOptions,
        checkpoints: Checkpoints,
        stopping: EarlyStopping | None,
        processes: Processes,
    ) -> None:
        """At the first step, or where the checkpoint is."""
        self.model, self.guide, self.options, self.stopping = model, guide, options, stopping
        self.processes = processes
        self.objective = Objective(
            model,
            guide,
            beta=options.beta,
            estimator=build_estimator(options.estimator),
            accumulation=options.gradient_accumulation,
            processes=processes,
            interrupts=checkpoints.interrupts,
        )
        self.augment = SpecAugment(model.net.config) if options.spec_augment else None
        self.device = model.net.device
        self.optimizer = torch.optim.Adam(guide.parameters(), lr=options.lr, fused=True)
        start = options.average_from
        self.average = None if start is None else Average(start * options.steps)
        self.done, self.skipped = 0, 0
        self.history: list[Step] = []
        self.place: StreamPosition | None = None
        self.checkpoints = checkpoints
        if checkpoint := processes.checkpoint(checkpoints):
            self._restore(checkpoint)

    @property
    def finished(self) -> bool:
        """All steps are done, and the last loss was finite; or the dev error stopped falling."""
        if self.stopping and self.stopping.stops:
            return True
        return self.done >= self.options.steps and not self.skipped

    def step(self, batch: Batch | None, place: StreamPosition | None = None) -> Step | None:
        """One step of SVI; None if it is skipped, or only tried after the last.

        `place` is where the batch was in a stream.

        A checkpoint is written once the loss of the step after it is known to be finite, and so
        never of weights that have gone astray.
        """
        interrupts = self.checkpoints.interrupts
        stop = self.processes.stops(interrupts)
        wanted = stop or self.checkpoints.due(self.done)
        before = self._state() if wanted else None
        self.processes.wants_checkpoint = wanted
        value, nll = self._gradients(batch)
        if place is not None and self.processes.wants_checkpoint:
            places = self.processes.of_all(place)
            before = before and replace(before, about={**before.about, "places": places})
        if before and math.isfinite(value):
            self.checkpoints.write(before)
        if stop:
            interrupts.answer()
        if not math.isfinite(value):
            self._skip(value)
            return None
        self.skipped = 0
        if self.done >= self.options.steps:
            return None
        return self._update(value, nll, self.objective.tokens)

    def _gradients(self, batch: Batch | None) -> tuple[float, float]:
        """Loss (or the gradients' norm, if that is not finite) and NLL; leaves the gradients."""
        with self.processes.noise(self.device):
            if self.augment and batch is not None:
                batch = self.augment(batch)
            return self.objective.gradients(batch, self.options.max_grad_norm or math.inf)

    def _update(self, loss: float, nll: float, tokens: int) -> Step:
        chosen = self.options
        peak, warm_up = chosen.lr, chosen.warmup_steps
        rate = learning_rate(self.done, chosen.steps, peak, chosen.schedule, warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        if self.average:
            self.average.update(self.done, self.guide)
        more = self.objective.regularizer
        kl = (loss - nll - more) / chosen.beta if chosen.beta else None
        self.history.append(Step(self.done, loss, nll, kl, rate, tokens, more))
        return self.history[-1]

    def evaluate(self) -> None:
        """Measure the posterior mean, if it is time to."""
        if self.stopping is None or self.skipped:
            return
        if self.stopping.due(self.done, self.options.steps):
            with RandomState.kept(self.device), self.model.adapters.using(self.guide.mean()):
                self.stopping.check(self.done, self.guide)

    def _skip(self, value: float) -> None:
        self.done = min(self.done + 1, self.options.steps)
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
        about: dict[str, Any] = {
            "random": random.about,
            "history": [vars(step) for step in self.history],
            "loss_scale": [self.objective.scale, self.objective.steps_at_scale],
        }
        if self.stopping:
            best, about["dev_errors"] = self.stopping.state()
            tensors |= {f"best.{name}": value for name, value in best.items()}
        if self.average:
            averages, about["averaged_steps"] = self.average.state()
            tensors |= {f"average.{name}": value for name, value in averages.items()}
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
            scale = checkpoint.about["loss_scale"]
            self.objective.scale, self.objective.steps_at_scale = scale
            if self.stopping:
                self.stopping.load_state(parts.get("best", {}), checkpoint.about["dev_errors"])
            if self.average:
                count = checkpoint.about["averaged_steps"]
                self.average.load_state(parts.get("average", {}), count)
            RandomState.of(checkpoint).restore(self.device)
            self._go_to(checkpoint.about.get("places", []))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint does not fit the guide ({why}); bring back what was changed, or "
                "start again with --overwrite"
            ) from None
        self.done = checkpoint.step

    def _go_to(self, places: Sequence[StreamPosition]) -> None:
        """Have a stream go on where it was; there is a place for each process."""
        count = self.processes.count
        if places and len(places) != count:
            raise UserError(
                f"the checkpoint is of a stream in {len(places)} processes, and now there are "
                f"{count}; start {len(places)}"
            )
        self.place = places[self.processes.rank] if places else None
