"""Encoder states that no factor changes, computed once for every utterance.

They lie in files without a name, which are gone with the process. Whoever asks for the states of
the same weights and the same utterances in one process gets the same file: the fits of a study, the
base and every adapter that leaves the encoder alone, all strengths of one fit.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256
from typing import IO

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from blora_pyro.data import Features
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir
from blora_pyro.models.encoder import encode

MOST_FILES = 32  # in a process; those that were asked for longest ago are given up

_ALTERNATIVES = "name another folder in BLORA_PYRO_CACHE, or leave cache_encoder out"


class EncoderStates:
    """States of a number of utterances, each computed when it is first asked for.

    Attributes:
        shape: Shape of an utterance's states, (positions, width).
        size: Size of the full file, bytes.
    """

    def __init__(self, utterances: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Create the file.

        Raises:
            UserError: If there is no room on the disk.
        """
        self.shape, self.dtype = shape, dtype
        self._row = shape[0] * shape[1] * dtype.itemsize
        self.size = utterances * self._row
        self._file = _open(self.size, utterances)
        weakref.finalize(self, self._file.close)
        self._known: set[int] = set()

    def of(self, indices: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Return the states of utterances, (indices, positions, width), on the CPU.

        Args:
            indices: Of the utterances.
            compute: Returns the states of some of them.

        Raises:
            UserError: If the disk is full.
        """
        if missing := [index for index in dict.fromkeys(indices) if index not in self._known]:
            for index, states in zip(missing, compute(missing), strict=True):
                self._write(index, states.cpu())
        return self._read(indices)

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


_kept: dict[Hashable, EncoderStates] = {}
# By module, with what tells that its tensors have not been changed since.
_hashes: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def states_of(
    net: WhisperForConditionalGeneration, utterances: int, what: Hashable
) -> EncoderStates:
    """Return the file of this process for some states of a net's encoder.

    Args:
        net: Its encoder's weights are part of what tells files apart.
        utterances: Their number.
        what: Everything else that the states depend on.

    Raises:
        UserError: See `EncoderStates`.
    """
    key = (weights_hash(net.get_encoder()), net.dtype, net.device.type, utterances, what)
    if (states := _kept.pop(key, None)) is None:
        shape = net.config.max_source_positions, net.config.d_model
        states = EncoderStates(utterances, shape, net.dtype)
    _kept[key] = states  # the last now
    while len(_kept) > MOST_FILES:
        _kept.pop(next(iter(_kept)))
    return states


@torch.inference_mode()
def last_states(
    net: WhisperForConditionalGeneration,
    fingerprint: str,
    features: Features,
    indices: Sequence[int],
) -> Tensor:
    """Return the encoder's last states of utterances, (indices, positions, width).

    Args:
        net: A net whose encoder is not adapted.
        fingerprint: Of all utterances, see `Examples`.
        features: Log-mels of all utterances.
        indices: Which are wanted.
    """

    def compute(missing: list[int]) -> Tensor:
        return encode(net, features[missing].to(net.device))

    try:
        kept = states_of(net, len(features), (fingerprint, "last"))
        return kept.of(indices, compute).to(net.device)
    except UserError:  # no room: they are computed whenever they are needed
        return compute(list(indices))


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of all tensors of a module, names and dtypes included."""
    tensors = sorted(module.state_dict(keep_vars=True).items())
    state = tuple((name, value.data_ptr(), value._version) for name, value in tensors)
    if module not in _hashes or _hashes[module][0] != state:
        total = sha256()
        for name, value in tensors:
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(content.numpy())
        _hashes[module] = state, total.hexdigest()
    return _hashes[module][1]


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
