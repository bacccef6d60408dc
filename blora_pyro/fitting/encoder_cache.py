"""States of the encoder before its first adapted layer, computed once for every utterance."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import IO

import torch
from torch import Tensor

from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir
from blora_pyro.fitting.batches import Teacher
from blora_pyro.models import BLoRA

_ALTERNATIVES = "name another folder in BLORA_PYRO_CACHE, or leave cache_encoder out"


class EncoderCache:
    """Adds the encoder's states before the first adapted layer to a batch, from a file on disk.

    They are the same at every step, as the layers before it are frozen and have no dropout, and no
    gradient goes through them. The file has no name: it is gone with the fit, however that ends.

    Attributes:
        shape: Shape of an utterance's states, (positions, width), in the net's dtype.
        size: Size of the full file, bytes.
    """

    def __init__(self, model: BLoRA, utterances: int, then: Teacher | None = None) -> None:
        """Create the file for all `utterances`; `then` is the teacher that follows.

        Raises:
            UserError: If the first layer is adapted, or there is no room on the disk.
        """
        if model.likelihood.first_adapted == 0:
            raise UserError(
                "cache_encoder is given, but target_modules adapts the encoder's first layer, and "
                "all after it changes; adapt the decoder alone, with target_modules "
                "'.*decoder.*', or later layers, or leave cache_encoder out"
            )
        self.likelihood, self.then = model.likelihood, then
        config, self.dtype = model.net.config, model.net.dtype
        self.shape = config.max_source_positions, config.d_model
        self._row = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.size = utterances * self._row
        self._file = _open(self.size, utterances)
        weakref.finalize(self, self._file.close)
        self._known: set[int] = set()

    def __call__(self, batch: Batch, indices: Sequence[int], number: int) -> Batch:
        """Return the batch (full windows, on the CPU) with the states.

        Raises:
            UserError: If the disk is full.
        """
        for index, features in zip(indices, batch.input_features, strict=True):
            if index not in self._known:
                self._write(index, self._states(features))
        batch = replace(batch, encoder_states=self._read(indices))
        return batch if self.then is None else self.then(batch, indices, number)

    @torch.no_grad()
    def _states(self, features: Tensor) -> Tensor:
        # One at a time, so that a resumed fit with other batches gets the same bits.
        features = features[None].to(self.likelihood.net.device)
        return self.likelihood.frozen_states(features)[0].cpu()

    def _write(self, index: int, states: Tensor) -> None:
        try:
            self._file.seek(index * self._row)
            self._file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cache_encoder can't write its {self.size / 1e9:.1f} GB ({error.strerror}); free "
                "some and resume the fit, or start another without cache_encoder"
            ) from None
        self._known.add(index)

    def _read(self, indices: Sequence[int]) -> Tensor:
        states = torch.empty(len(indices), *self.shape, dtype=self.dtype)
        for index, row in zip(indices, states.view(torch.uint8).numpy(), strict=True):
            self._file.seek(index * self._row)
            self._file.readinto(row)  # type: ignore[attr-defined]
        return states


def _open(size: int, utterances: int) -> IO[bytes]:
    """Return a file without a name where there is room for it."""
    folder = cache_dir()
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        where = folder or tempfile.gettempdir()
        free = shutil.disk_usage(where).free
        if size <= free:
            return tempfile.TemporaryFile(dir=where)
    except OSError as error:
        raise UserError(
            f"cache_encoder can't write into {folder} ({error.strerror}); {_ALTERNATIVES}"
        ) from None
    raise UserError(
        f"cache_encoder needs {size / 1e9:.1f} GB for {utterances:,} utterances, and {where} has "
        f"{free / 1e9:.1f} GB; {_ALTERNATIVES}"
    )
