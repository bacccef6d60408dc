"""Stochastic variational inference: a guide fitted to a model, step by step and resumable."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blora_pyro.data import IGNORED, Batch, Examples, Stream, StreamPosition
from blora_pyro.errors import UserError
from blora_pyro.fitting.alarms import Alarms
from blora_pyro.fitting.batches import SpecAugment, Teacher, batches
from blora_pyro.fitting.checkpoints import Checkpoint, Checkpoints, RandomState
from blora_pyro.fitting.history import Step
from blora_pyro.fitting.natural_gradient import deviation_parameters, natural_step
from blora_pyro.fitting.objective import Objective
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.stopping import Average, EarlyStopping
from blora_pyro.guides import Guide
from blora_pyro.models import WhisperProgram, build_estimator
from blora_pyro.options import FittingOptions, Schedule, default_warmup_steps

MAX_SKIPPED = 10  # steps in a row


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    schedule: Schedule = "cosine",
    warmup_steps: int | None = None,
) -> float:
    """Return the learning rate of one step.

    Args:
        step: Counted from 0.
        steps: Number of steps.
        peak: The highest rate, that of the last step of the warm-up.
        schedule: After the warm-up half a `cosine` or a `linear` slope to zero, or `constant`.
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


def fit_guide(
    model: WhisperProgram,
    guide: Guide,
    examples: Examples | Stream,
    options: FittingOptions,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
    early_stopping: EarlyStopping | None = None,
    teacher: Teacher | None = None,
    processes: Processes | None = None,
    alarms: Alarms | None = None,
) -> list[Step]:
    """Fit `guide` to `model` by SVI on `mean token NLL + beta · KL`, one weight draw a step.

    Adam without weight decay (which would ruin the means), gradients through the reparameterised
    draw; under `optimizer` natural-gradient deviations by `natural_step`. Pyro's global parameter
    store is left as it was.

    A step whose loss or gradient is not finite is skipped: the weights stay, and the step is not in
    the history. A fit does not end on such a step, but tries further batches.

    From a checkpoint it continues bit by bit as if never interrupted, on the same machine with the
    same number of threads. The whole state of a guide is its `state_dict`.

    Args:
        model: The Pyro program.
        guide: An `nn.Module` with the model's arguments; moved to the model's device.
        examples: Training data; a stream has no `data_weights` and no teacher.
        options: Options of the fit, with a number as beta; a `FitConfig` is one.
        on_step: Called after every step.
        checkpoints: Where the fit continues, and where it is stored on the way.
        early_stopping: Measures the posterior mean on the way, may end the fit before its last
            step, and gives the guide the best parameters at the end. Earlier steps are the same
            as without it.
        teacher: Completes every batch, see `Distillation` and `EncoderCache`.
        processes: Those that fit together; None is this one alone.
        alarms: May end the fit early, with its last good parameters (or the best by
            `early_stopping`, where it has measured).

    Returns:
        One `Step` for every step that was not skipped.

    Raises:
        FloatingPointError: If loss or gradient are not finite ten times in a row.
        UserError: If the checkpoint is damaged or of another fit, the dev set has nothing to score,
            a stream can't be read on, or the optimizer can't fit the guide.
        OSError: If a checkpoint can't be written.
        Interrupted: If a signal has come; a checkpoint has been written.
        ProcessLost: If one of several processes is gone.
    """
    assert isinstance(guide, nn.Module)
    device, processes = model.net.device, processes or Processes()
    try:
        with pyro.get_param_store().scope(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN")  # they are counted here
            guide.to(device)
            guide(examples.batch([0]).to(device))  # Pyro's own guides make their parameters here
            checkpoints = checkpoints or Checkpoints(None)
            trainer = Trainer(model, guide, options, checkpoints, early_stopping, processes, alarms)
            trainer.evaluate()  # a checkpoint may be from just before
            stream = batches(
                examples,
                options.batch_size,
                options.seed,
                options.data_weights,
                start=trainer.done,
                position=trainer.position,
                teacher=teacher,
                processes=processes,
            )
            with closing(stream):
                while not trainer.finished:
                    batch, position = next(stream)
                    if step := trainer.step(batch and batch.to(device), position):
                        on_step(step)
                    trainer.evaluate()
    finally:
        model.adapters.clear()
    if early_stopping and early_stopping.errors:
        early_stopping.restore(guide)
    elif alarms and alarms.ended:
        alarms.restore(guide)
    elif trainer.average:
        trainer.average.restore(guide)
    return trainer.history


class Trainer:
    """The state of a fit between two steps, and the step that changes it.

    Attributes:
        done: Number of steps so far, the skipped ones included.
        skipped: Number of the last steps that were skipped in a row.
        history: The steps that were not skipped.
        position: Where a stream continues; None is its beginning.
    """

    def __init__(
        self,
        model: WhisperProgram,
        guide: Any,
        options: FittingOptions,
        checkpoints: Checkpoints,
        stopping: EarlyStopping | None,
        processes: Processes,
        alarms: Alarms | None = None,
    ) -> None:
        """Start at the first step, or where the checkpoint is."""
        self.model, self.guide, self.options, self.stopping = model, guide, options, stopping
        self.beta, self.device, self.processes = float(options.beta), model.net.device, processes
        self.objective = Objective(
            model,
            guide,
            beta=self.beta,
            estimator=build_estimator(options.estimator),
            accumulation=options.gradient_accumulation,
            processes=processes,
            interrupts=checkpoints.interrupts,
        )
        self.augment = SpecAugment(model.net.config) if options.spec_augment else None
        natural = options.optimizer == "natural-gradient"
        self.rhos = deviation_parameters(guide, self.beta) if natural else []
        apart = {id(rho) for rho in self.rhos}
        named = [(name, one) for name, one in guide.named_parameters() if id(one) not in apart]
        self.names = [name for name, _ in named]
        self.optimizer = torch.optim.Adam([one for _, one in named], lr=options.lr, fused=True)
        start = options.average_from
        self.average = None if start is None else Average(start * options.steps)
        self.done, self.skipped = 0, 0
        self.history: list[Step] = []
        self.position: StreamPosition | None = None
        self.checkpoints, self.alarms = checkpoints, alarms
        self.start = {name: value.detach().clone() for name, value in guide.mean().items()}
        if alarms:
            alarms.start(guide)
        if checkpoint := processes.read_checkpoint(checkpoints):
            self._restore(checkpoint)

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the last loss was finite, or something ends it early."""
        if self.alarms and self.alarms.ended:
            return True
        if self.stopping and self.stopping.stops:
            return True
        return self.done >= self.options.steps and not self.skipped

    def step(self, batch: Batch | None, position: StreamPosition | None = None) -> Step | None:
        """Do one step of SVI; None if it is skipped, or only tried after the last.

        A checkpoint is written once the loss of the step after it is known to be finite, and so
        never of weights that have diverged. The batch is on the model's device, `position` is where
        it was read in a stream.
        """
        interrupts = self.checkpoints.interrupts
        stop = self.processes.stops(interrupts)
        wanted = stop or self.checkpoints.due(self.done)
        before = self._state() if wanted else None
        self.processes.wants_checkpoint = wanted
        with self.processes.noise(self.device):
            if self.augment and batch is not None:
                batch = self.augment(batch)
            value, nll = self.objective.gradients(batch, self.options.max_grad_norm or math.inf)
        if position is not None and self.processes.wants_checkpoint:
            places = self.processes.gather(position)
            before = before and replace(before, about={**before.about, "places": places})
        if before and math.isfinite(value):
            self.checkpoints.write(before)
        if stop:
            interrupts.answer()
        if not math.isfinite(value):
            self._skip(value)
            return None
        self.skipped = 0
        if self.done == self.options.steps:
            return None
        step = self._update(value, nll)
        if self.alarms:
            errors = self.stopping.errors if self.stopping else []
            self.alarms.check(self.history, errors, self.guide, lambda: self.nll_at_start(batch))
        return step

    @torch.no_grad()
    def nll_at_start(self, batch: Batch | None) -> float:
        """Return the mean NLL of a batch's target tokens at the mean that the fit started with."""
        total, tokens = 0.0, 0
        if batch is not None:
            self.model.place(self.start, batch)
            assert batch.labels is not None
            logits, _ = self.model.likelihood(replace(batch, soft=None))
            total = cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            tokens = batch.num_tokens
        parts = self.processes.gather([total, tokens]) if self.processes.count > 1 else []
        totals, counts = zip(*(parts or [(total, tokens)]), strict=True)
        return sum(totals) / sum(counts)

    def _update(self, loss: float, nll: float) -> Step:
        options, regularizer = self.options, self.objective.regularizer
        rate = learning_rate(
            self.done, options.steps, options.lr, options.schedule, options.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        natural_step(self.rhos, self.beta, self.done)
        self.done += 1
        if self.average:
            self.average.update(self.done, self.guide)
        kl = (loss - nll - regularizer) / self.beta if self.beta else None
        tokens, norm = self.objective.tokens, self.objective.grad_norm
        step = Step(self.done, loss, nll, kl, rate, tokens, regularizer, norm)
        self.history.append(step)
        return step

    def _skip(self, value: float) -> None:
        self.done = min(self.done + 1, self.options.steps)
        self.skipped += 1
        if self.skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient is {value} at step {self.done}, and was not finite "
                f"{MAX_SKIPPED} times in a row"
            )

    def evaluate(self) -> None:
        """Measure the posterior mean, if it is due."""
        stopping = None if self.skipped else self.stopping
        if stopping and stopping.due(self.done, self.options.steps):
            with RandomState.kept(self.device), self.model.adapters.using(self.guide.mean()):
                stopping.check(self.done, self.guide)

    # ---- the checkpoint: names and tensors are those of every earlier version

    def _state(self) -> Checkpoint:
        random = RandomState.now(self.device)
        tensors = {f"guide.{name}": value for name, value in self.guide.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            name = self.names[index]
            tensors |= {f"adam.{slot}.{name}": value for slot, value in slots.items()}
        about: dict[str, Any] = {
            "random": random.about,
            "history": [step.to_json() for step in self.history],
            "loss_scale": [self.objective.scale, self.objective.steps_at_scale],
        }
        if self.stopping:
            best, about["dev_errors"] = self.stopping.state()
            tensors |= {f"best.{name}": value for name, value in best.items()}
        if self.alarms:
            kept, about["alarms"] = self.alarms.state()
            tensors |= {f"kept.{name}": value for name, value in kept.items()}
        if self.average:
            averages, about["averaged_steps"] = self.average.state()
            tensors |= {f"average.{name}": value for name, value in averages.items()}
        return Checkpoint.copy(self.done, tensors | random.tensors, about)

    def _restore(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        slots: dict[int, dict[str, Tensor]] = {}
        try:
            self.guide.load_state_dict(parts["guide"])
            for key, value in parts.get("adam", {}).items():
                slot, _, name = key.partition(".")
                slots.setdefault(self.names.index(name), {})[slot] = value.clone()
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
            self.history = [Step(**step) for step in checkpoint.about["history"]]
            scale = checkpoint.about["loss_scale"]
            self.objective.scale, self.objective.steps_at_scale = scale
            if self.stopping:
                self.stopping.load_state(parts.get("best", {}), checkpoint.about["dev_errors"])
            if self.alarms and "alarms" in checkpoint.about:
                self.alarms.load_state(parts.get("kept", {}), checkpoint.about["alarms"])
            if self.average:
                count = checkpoint.about["averaged_steps"]
                self.average.load_state(parts.get("average", {}), count)
            RandomState.of(checkpoint).restore(self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint does not fit the guide ({why}); bring back what was changed, or "
                "start again with --overwrite"
            ) from None
        self.done = checkpoint.step
        positions: Sequence[StreamPosition] = checkpoint.about.get("places", [])
        if positions and len(positions) != self.processes.count:
            raise UserError(
                f"the checkpoint is of a stream in {len(positions)} processes, and now there are "
                f"{self.processes.count}; start {len(positions)}"
            )
        self.position = positions[self.processes.rank] if positions else None
