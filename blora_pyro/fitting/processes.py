"""One fit in several processes: who is who, how gradients meet, and how all end together.

Accelerate is the engine: `accelerate launch` (or `torchrun`) starts the processes, and its
`PartialState` joins them, on one machine or on many. What the fit needs of it is little: a sum over
all processes once a step, and what the main process alone has read or measured told to the others.
Messages are tensors and JSON; nothing is pickled.
"""

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from blora_pyro.errors import Elsewhere, ProcessLost, UserError
from blora_pyro.fitting.checkpoints import (
    Checkpoint,
    Checkpoints,
    RandomState,
    from_bytes,
    to_bytes,
)
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.launched import started

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # with a silent process; a dead one is lost at once


class Processes:
    """The processes of one fit.

    Attributes:
        rank: The number of this one; 0 is the main process, which alone writes and reports.
        count: How many there are.
        wants_checkpoint: Whether some process, in a step all, is to write a checkpoint.
        shared_noise: Every process draws the same weights. The default, weights of each process's
            own, averages the gradient over as many draws, which lowers its variance.
    """

    def __init__(self, rank: int = 0, count: int = 1, shared_noise: bool = False) -> None:
        """One that is alone, or one of several that have joined already."""
        self.rank, self.count, self.shared_noise = rank, count, shared_noise
        self.wants_checkpoint = False
        self._stop = False

    @classmethod
    def join(cls, device: str = "cpu") -> "Processes":
        """Join those that were started together; one alone where none were.

        Args:
            device: A torch device without a number, of which every process takes its own.

        Raises:
            UserError: If the device has a number.
        """
        if started() == 1:
            return cls()
        if ":" in device:
            raise UserError(
                f"device is '{device}' in {started()} processes; give "
                f"{device.partition(':')[0]}, and each takes its own"
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    def leave(self) -> None:
        """End the connections; others that still wait for this process then fail."""
        if self.count > 1 and torch.distributed.is_initialized():
            from accelerate import PartialState

            torch.distributed.destroy_process_group()
            PartialState._reset_state()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items of a step that are this process's: all others have the rest."""
        return items[self.rank :: self.count]

    # ---- what a step needs

    def add_up(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], interrupts: Interrupts
    ) -> list[float]:
        """Sums over all processes, in one message, which tells of signals and checkpoints, too.

        Args:
            tensors: The same shapes in every process, on one device; summed in place.
            numbers: As many in every process.
            interrupts: A signal that one process has caught stops all, see `stops`.

        Returns:
            The sums of the numbers.

        Raises:
            ProcessLost: If one is gone.
        """
        if self.count == 1:
            return list(numbers)
        device = tensors[0].device
        told = [*numbers, float(interrupts.caught is not None), float(self.wants_checkpoint)]
        flat = torch.cat([*(one.reshape(-1) for one in tensors), torch.tensor(told, device=device)])
        with self._lost():
            torch.distributed.all_reduce(flat)
        sizes = [one.numel() for one in tensors]
        *sums, rest = flat.split([*sizes, len(told)])
        for one, total in zip(tensors, sums, strict=True):
            one.copy_(total.view_as(one))
        *totals, caught, wanted = rest.tolist()
        self._stop, self.wants_checkpoint = caught > 0, wanted > 0
        return totals

    def stops(self, interrupts: Interrupts) -> bool:
        """Whether this is the last step, because some process has caught a signal.

        All agree: a signal counts from the step on after that in which it was told.
        """
        if self.count == 1:
            return interrupts.caught is not None
        if self._stop and interrupts.caught is None:
            interrupts.caught = signal.SIGTERM
        return self._stop

    @contextmanager
    def noise(self, device: torch.device) -> Iterator[None]:
        """In here every process draws noise of its own (or all the same, with `shared_noise`).

        What is drawn after it does not depend on it, so that the generators of all processes stay
        alike, whatever each of them draws for its part of a batch.
        """
        if self.count == 1:
            yield
            return
        seed = int(torch.randint(2**31, ()))
        with RandomState.kept(device):
            pyro.set_rng_seed(seed + (0 if self.shared_noise else self.rank))
            yield

    # ---- what the main process tells

    def tell(self, content: bytes | None, source: int = 0) -> bytes:
        """What the main process gives, or another, in all of them.

        Args:
            content: In that process; elsewhere it does not count.
            source: Its rank.

        Raises:
            ProcessLost: If one is gone.
        """
        if self.count == 1:
            assert content is not None
            return content
        device = _device()
        data = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(device)
        size = torch.tensor([len(content or b"")], device=device)
        with self._lost():
            torch.distributed.broadcast(size, source)
            if self.rank != source:
                data = torch.empty(max(int(size), 1), dtype=torch.uint8, device=device)
            torch.distributed.broadcast(data, source)
        return data[: int(size)].cpu().numpy().tobytes()

    def of_all(self, value: Any) -> list[Any]:
        """A JSON value of every process, by rank, in all of them.

        Raises:
            ProcessLost: If one is gone.
        """
        own = json.dumps(value).encode()
        return [json.loads(self.tell(own, source=rank)) for rank in range(self.count)]

    def once(self, function: Callable[[], T]) -> Callable[[], T]:
        """The function, computed by the main process alone and told to all; a JSON value."""

        def computed() -> T:
            value = json.dumps(function()).encode() if self.is_main else None
            return json.loads(self.tell(value))

        return computed if self.count > 1 else function

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is in here first; the others do if it could.

        Raises:
            Elsewhere: In the others, if it failed.
            ProcessLost: If one is gone.
        """
        if self.count > 1 and not self.is_main and self.tell(None) != b"done":
            raise Elsewhere
        try:
            yield
        except BaseException:
            if self.count > 1 and self.is_main:
                self.tell(b"failed")
            raise
        if self.count > 1 and self.is_main:
            self.tell(b"done")

    def checkpoint(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """The checkpoint that the main process finds, in all of them.

        Raises:
            UserError: See `Checkpoints.read`.
            Elsewhere: In the others, then.
            ProcessLost: If one is gone.
        """
        found = None
        with self.main_first():
            if self.is_main:
                found = checkpoints.read()
        if self.count == 1:
            return found
        content = self.tell((to_bytes(found) if found else b"") if self.is_main else None)
        return from_bytes(content) if content else None

    def told_by_main(self, function: Callable[[], Any]) -> Any:
        """A JSON value of the main process, in all of them.

        Raises:
            Elsewhere: In the others, if it failed.
            ProcessLost: If one is gone.
        """
        found: Any = None
        with self.main_first():
            if self.is_main:
                found = function()
        return self.once(lambda: found)()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # so says every backend where a peer is gone
            if self._is_first_to_tell():
                raise ProcessLost(f"a process of {self.count} is gone") from error
            raise Elsewhere from error

    def _is_first_to_tell(self) -> bool:
        """Whether no other process says so already; this one, if that can't be known."""
        try:
            store = torch.distributed.distributed_c10d._get_default_store()
            return store.add("blora_pyro/lost", 1) == 1
        except Exception:  # the store was in the process that is gone
            return True


def _device() -> torch.device:
    """Where messages of the backend lie."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients, zeros where there are none."""
    found = []
    for one in parameters:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
        found.append(one.grad)
    return found
