"""Checkpoints of a fit: one file, replaced atomically, read without unpickling.

`checkpoint.safetensors` holds tensors and, in its metadata, JSON and a check sum of both.
"""

import json
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.files import parse_json, read_file, replace_file
from blora_pyro.fitting.interrupts import Interrupts

FILE = "checkpoint.safetensors"
VERSION = 1
SECONDS = 2.0  # between two checkpoints, at the least
SHARE = 0.02  # the largest part of the time that writing them may take


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next steps of a fit depend on.

    Attributes:
        step: Number of steps done.
        tensors: Parameters of the guide, state of the optimiser, states of random generators.
        about: Everything else, as JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @classmethod
    def copy(
        cls, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> "Checkpoint":
        """Return a checkpoint with copies of the tensors, on the CPU."""
        plain = torch.contiguous_format
        copies = {
            name: value.detach().cpu().clone(memory_format=plain) for name, value in tensors.items()
        }
        return cls(step, copies, about)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint at `path`; an OSError leaves the earlier one."""
    replace_file(path, to_bytes(checkpoint))  # save_file leaves files behind when it is killed


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """Return the content of a checkpoint file."""
    tensors = dict(checkpoint.tensors)
    about = {"version": VERSION, "step": checkpoint.step, **checkpoint.about}
    text = json.dumps(about, allow_nan=False)
    return save(tensors, {"blora_pyro": text, "crc32": str(_check_sum(text, tensors))})


def from_bytes(content: bytes) -> Checkpoint:
    """Return the checkpoint of a file's content.

    Raises:
        SafetensorError, KeyError, TypeError, ValueError: If it is damaged or no checkpoint.
    """
    tensors = load(content)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = parse_json(header)["__metadata__"]
    text = metadata["blora_pyro"]
    if int(metadata["crc32"]) != _check_sum(text, tensors):
        raise ValueError("its check sum is wrong")
    about = parse_json(text)
    if about["version"] != VERSION:
        raise ValueError(f"it has format {about['version']}, not {VERSION}")
    return Checkpoint(about["step"], tensors, about)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: If it can't be read, is damaged, or of another version.
    """
    try:
        return from_bytes(read_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}); delete it and the fit starts from "
            "its first step, or bring back a copy"
        ) from None


def stored_step(path: Path) -> int | None:
    """Return the step of the checkpoint at `path` without reading tensors; None without one."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return int(parse_json(file.metadata()["blora_pyro"])["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _check_sum(text: str, tensors: Mapping[str, Tensor]) -> int:
    total = zlib.crc32(text.encode())
    for name, value in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


class Checkpoints:
    """The checkpoint of one fit in its folder: when it is written, and which fit it belongs to.

    A checkpoint of L adapter weights takes about 24 L bytes (mean, rho, and two moments of Adam for
    each), and a third of that more each with alarms and with early stopping: 13 MB for the pocket
    Whisper with alarms, 210 MB for whisper-large-v3-turbo at rank 32 on q_proj and v_proj. So by
    default it is written every two seconds, but no more often than that writing takes a fiftieth of
    the time.
    """

    def __init__(
        self,
        folder: Path | None,
        fit: Mapping[str, Any] | None = None,
        every: int | None = None,
        interrupts: Interrupts | None = None,
        defaults: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store the checkpoint of a fit in a folder.

        Args:
            folder: Folder of the checkpoint; None writes none.
            fit: Options and data as JSON values; a checkpoint with others is refused.
            every: Steps between two; None decides by time, as above.
            interrupts: A caught signal writes a checkpoint and ends the fit.
            defaults: What options are that a checkpoint of an earlier version does not have.
            clock: Returns seconds.
        """
        self.path = None if folder is None else folder / FILE
        self.fit = json.loads(json.dumps(fit or {}))
        self.defaults = json.loads(json.dumps(dict(defaults or {})))
        self.every = every
        self.interrupts = interrupts or Interrupts(active=False)
        self._clock = clock
        self._last, self._written, self._cost = 0, clock(), 0.0

    def stored_step(self) -> int | None:
        """Return the step of the stored checkpoint; None if there is none."""
        return None if self.path is None else stored_step(self.path)

    def due(self, step: int) -> bool:
        """Return whether one should be written after `step` steps."""
        if self.path is None or step == self._last:
            return False
        if self.every is not None:
            return step % self.every == 0
        return self._clock() - self._written >= max(SECONDS, self._cost / SHARE)

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; an OSError leaves the earlier one."""
        if self.path is None:
            return
        started = self._clock()
        about = {**checkpoint.about, "fit": self.fit}
        write_checkpoint(self.path, Checkpoint(checkpoint.step, checkpoint.tensors, about))
        self._last, self._written = checkpoint.step, self._clock()
        self._cost = self._written - started

    def read(self) -> Checkpoint | None:
        """Return the stored checkpoint, or None.

        Raises:
            UserError: If it is damaged, of another version, or of another fit.
        """
        if self.path is None or not self.path.exists():
            return None
        checkpoint = read_checkpoint(self.path)
        stored = checkpoint.about.get("fit")
        for name, value in self.fit.items():
            default = self.defaults.get(name)
            old = stored.get(name, default) if isinstance(stored, dict) else None
            if old != value or not isinstance(stored, dict):
                raise UserError(
                    f"{self.path} is of another fit: {name} was {old}, now it is {value}; bring "
                    "back what has changed, or start again with --overwrite"
                )
        self._last = checkpoint.step
        return checkpoint


@dataclass(frozen=True)
class RandomState:
    """The states of all random generators that a program may draw from.

    Attributes:
        tensors: torch's: `random.cpu`, and `random.cuda` of a fit on a GPU.
        about: Python's and NumPy's, as JSON values.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the current states."""
        tensors = {"random.cpu": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
        state = np.random.get_state(legacy=True)  # noqa: NPY002 - what pyro.set_rng_seed seeds
        kind, keys, *rest = state
        numpy = [kind, np.asarray(keys).tolist(), *rest]
        return cls(tensors, {"python": random.getstate(), "numpy": numpy})

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "RandomState":
        """Return the states in a checkpoint; a KeyError says that it has none."""
        names = ("random.cpu", "random.cuda")
        tensors = {name: checkpoint.tensors[name] for name in names if name in checkpoint.tensors}
        return cls(tensors, checkpoint.about["random"])

    def restore(self, device: torch.device) -> None:
        """Set the generators; a KeyError, TypeError or ValueError says that a state is wrong."""
        torch.set_rng_state(self.tensors["random.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["random.cuda"], device)
        version, numbers, gauss = self.about["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = self.about["numpy"]
        state = (kind, np.array(keys, np.uint32), *rest)
        np.random.set_state(state)  # noqa: NPY002

    @classmethod
    @contextmanager
    def kept(cls, device: torch.device) -> Iterator[None]:
        """Restore the states at the end of a `with`."""
        state = cls.now(device)
        try:
            yield
        finally:
            state.restore(device)
