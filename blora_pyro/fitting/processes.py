"""One fit in several processes, on Accelerate: gradients are summed, and all end together.

`accelerate launch` (or `torchrun`) starts the processes, and Accelerate's `PartialState` joins
them, on one machine or on many. A step needs one sum over all processes; besides that the main
process broadcasts what it alone has read or measured. Messages are tensors and JSON; nothing is
pickled.
"""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from blora_pyro.errors import OtherProcessFailed, ProcessLost, UserError, started
from blora_pyro.fitting.checkpoints import (
    Checkpoint,
    Checkpoints,
    RandomState,
    from_bytes,
    to_bytes,
)
from blora_pyro.fitting.interrupts import Interrupts

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # of a silent process; one that has ended is noticed at once


class Processes:
    """The processes of one fit.

    Attributes:
        rank: The number of this one; 0 is the main process, which alone writes and reports.
        count: How many there are.
        wants_checkpoint: Whether this process, and after a step any process, asks for a checkpoint.
        shared_noise: Every process draws the same weights. By default each draws its own, which
            averages the gradient over as many draws and lowers its variance.
    """

    def __init__(self, rank: int = 0, count: int = 1, shared_noise: bool = False) -> None:
        """Describe a process that is alone, or one of several that have joined."""
        self.rank, self.count, self.shared_noise = rank, count, shared_noise
        self.wants_checkpoint = False
        self._stop = False

    @classmethod
    def join(cls, device: str = "cpu") -> "Processes":
        """Join the processes that were started together; a single one joins nothing.

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

        state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
        state.debug = False  # its checks of messages would pickle
        return cls(state.process_index, state.num_processes)

    def leave(self) -> None:
        """End the connections; processes that still wait for this one then fail."""
        if self.count > 1 and torch.distributed.is_initialized():
            from accelerate import PartialState

            PartialState().destroy_process_group()
            PartialState._reset_state()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the items of a step."""
        return items[self.rank :: self.count]

    def sum_over_all(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], interrupts: Interrupts
    ) -> list[float]:
        """Return sums over all processes, in one message that also carries signals and checkpoints.

        Args:
            tensors: The same shapes in every process, on one device; summed in place.
            numbers: As many in every process; their sums are returned.
            interrupts: A signal that one process has caught stops all, see `stops`.

        Raises:
            ProcessLost: If one is gone.
        """
        if self.count == 1:
            return list(numbers)
        from accelerate.utils import reduce

        device = tensors[0].device
        flags = [float(interrupts.caught is not None), float(self.wants_checkpoint)]
        tail = torch.tensor([*numbers, *flags], device=device)
        flat = torch.cat([*(one.reshape(-1) for one in tensors), tail])
        with self._connected():
            flat = reduce(flat, "sum")
        *sums, tail = flat.split([*(one.numel() for one in tensors), len(tail)])
        for one, total in zip(tensors, sums, strict=True):
            one.copy_(total.view_as(one))
        *totals, caught, wanted = tail.tolist()
        self._stop, self.wants_checkpoint = caught > 0, wanted > 0
        return totals

    def stops(self, interrupts: Interrupts) -> bool:
        """Return whether this is the last step, because some process has caught a signal.

        All agree: a signal counts from the step after the one whose message carried it.
        """
        if self.count == 1:
            return interrupts.caught is not None
        if self._stop and interrupts.caught is None:
            interrupts.caught = signal.SIGTERM
        return self._stop

    @contextmanager
    def noise(self, device: torch.device) -> Iterator[None]:
        """Inside a `with` every process draws its own noise (or the same, with `shared_noise`).

        What is drawn afterwards does not depend on it, so that the generators of all processes
        stay alike, whatever each of them draws for its part of a batch.
        """
        if self.count == 1:
            yield
            return
        seed = int(torch.randint(2**31, ()))
        with RandomState.kept(device):
            pyro.set_rng_seed(seed + (0 if self.shared_noise else self.rank))
            yield

    def broadcast(self, content: bytes | None, source: int = 0) -> bytes:
        """Return the bytes that the process of rank `source` gives, in all; others' are ignored.

        Raises:
            ProcessLost: If one is gone.
        """
        if self.count == 1:
            assert content is not None
            return content
        from accelerate import PartialState
        from accelerate.utils import broadcast

        device = torch.device(PartialState().device)
        data = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(device)
        size = torch.tensor([len(content or b"")], device=device)
        with self._connected():
            size = broadcast(size, source)
            if self.rank != source:
                data = torch.empty(max(int(size), 1), dtype=torch.uint8, device=device)
            data = broadcast(data, source)
        return data[: int(size)].cpu().numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, by rank, in all of them.

        Raises:
            ProcessLost: If one is gone.
        """
        own = json.dumps(value).encode()
        return [json.loads(self.broadcast(own, source=rank)) for rank in range(self.count)]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Inside a `with` the main process goes first, and the others follow if it succeeds.

        Raises:
            OtherProcessFailed: In the others, if it failed.
            ProcessLost: If one is gone.
        """
        if self.count > 1 and not self.is_main and self.broadcast(None) != b"done":
            raise OtherProcessFailed
        try:
            yield
        except BaseException:
            if self.count > 1 and self.is_main:
                self.broadcast(b"failed")
            raise
        if self.count > 1 and self.is_main:
            self.broadcast(b"done")

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Return a JSON value that the main process computes, in all of them.

        Raises:
            OtherProcessFailed: In the others, if it failed.
            ProcessLost: If one is gone.
        """
        if self.count == 1:
            return function()
        return json.loads(self._bytes_from_main(lambda: json.dumps(function()).encode()))

    def read_checkpoint(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Return the checkpoint that the main process finds, in all of them; see `from_main`."""
        if self.count == 1:
            return checkpoints.read()

        def read() -> bytes:
            found = checkpoints.read()
            return to_bytes(found) if found else b""

        content = self._bytes_from_main(read)
        return from_bytes(content) if content else None

    def _bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        with self.main_first():
            content = function() if self.is_main else None
        return self.broadcast(content)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Inside a `with`, turn the loss of a connection into an error that one process reports."""
        try:
            yield
        except RuntimeError as error:  # what every backend raises when a peer is gone
            try:
                store = torch.distributed.distributed_c10d._get_default_store()
                is_first = store.add("blora_pyro/lost", 1) == 1
            except Exception:  # the store was in the process that is gone
                is_first = True
            if is_first:
                raise ProcessLost(f"a process of {self.count} is gone") from error
            raise OtherProcessFailed from error
