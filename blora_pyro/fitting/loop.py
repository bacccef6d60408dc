"""Stochastic variational inference: the loop that fits a guide to a model."""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import pyro
from torch import nn

from blora_pyro.data import Batch, Examples, Stream, StreamPosition, batch_indices
from blora_pyro.fitting.checkpoints import Checkpoints
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.fitting.svi import Loop, Step, SviOptions
from blora_pyro.guides import Guide
from blora_pyro.models import WhisperProgram

# Gives a batch, of these utterances, the batch of this number, its soft targets, or states of the
# encoder.
Teacher = Callable[[Batch, Sequence[int], int], Batch]


def batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    start: int = 0,
    weights: Sequence[float] | None = None,
    teacher: Teacher | None = None,
    processes: Processes | None = None,
) -> Iterator[Batch | None]:
    """Endless batches, in the order of `batch_indices`.

    The order depends on `seed` alone; `start` leaves out the first batches without making them. Of
    several processes each gets its part of every batch, and None where there are not enough.
    """
    order = batch_indices(examples.sources, batch_size, seed, weights)
    for number, indices in islice(enumerate(order), start, None):
        own = (processes or Processes()).share(indices)
        batch = examples.batch(own) if own else None
        yield batch if batch is None or teacher is None else teacher(batch, own, number)


def _drawn(
    examples: Examples | Stream, loop: Loop, teacher: Teacher | None
) -> Generator[tuple[Batch | None, StreamPosition | None], None, None]:
    """Endless batches from where the loop is, and of a stream the places that they are from."""
    chosen, processes = loop.options, loop.processes
    if isinstance(examples, Stream):
        own = loop.place, processes.rank, processes.count
        yield from examples.batches(chosen.batch_size, *own)
    else:
        order = chosen.batch_size, chosen.seed, loop.done, chosen.weights
        for batch in batches(examples, *order, teacher, processes):
            yield batch, None


def fit_guide(
    model: WhisperProgram,
    guide: Guide,
    examples: Examples | Stream,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
    early_stopping: EarlyStopping | None = None,
    teacher: Teacher | None = None,
    processes: Processes | None = None,
    **options: Any,
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
        examples: Training data; a stream has no `weights` and no teacher.
        on_step: Called after every step.
        checkpoints: Where to go on from, and what to write on the way.
        early_stopping: Measures the posterior mean on the way, may end the fit before its last
            step, and has the guide end with the best parameters. It changes no step before that.
        teacher: Gives batches what is more than data, see `Distillation` and `EncoderCache`.
        processes: Those that fit together; None is this one alone.
        **options: The attributes of `SviOptions`.

    Returns:
        One `Step` a step.

    Raises:
        FloatingPointError: If loss or gradient are not finite ten times in a row.
        UserError: If there is no such estimator, the checkpoint is damaged or of another fit, the
            dev set has nothing to score, or a stream can't be read on.
        OSError: If a checkpoint can't be written.
        Interrupted: If a signal has come; a checkpoint has been written.
        ProcessLost: If one of several processes is gone.
    """
    assert isinstance(guide, nn.Module)
    chosen, device = SviOptions(**options), model.net.device
    together = processes or Processes()
    try:
        with pyro.get_param_store().scope(), _without_nan_warnings():
            guide.to(device)
            guide(examples.batch([0]).to(device))  # Pyro's own guides make their parameters here
            around = checkpoints or Checkpoints(None), early_stopping, together
            loop = Loop(model, guide, chosen, *around)
            loop.evaluate()  # a checkpoint may be from just before
            with closing(_drawn(examples, loop, teacher)) as data:
                while not loop.finished:
                    batch, place = next(data)
                    if step := loop.step(batch and batch.to(device), place):
                        on_step(step)
                    loop.evaluate()
    finally:
        model.adapters.clear()
    if early_stopping:
        early_stopping.restore(guide)
    elif loop.average:
        loop.average.restore(guide)
    return loop.history


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Keep Pyro from warning of what is counted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield
