"""Log-mels kept on disk, so that no utterance is featurised twice.

They lie in `$BLORA_PYRO_CACHE/features/` (by default `~/.cache/blora-pyro/features/`), a folder for
each way of computing them, in shards: safetensors files with the log-mels of up to 64 utterances,
and what else was found of their audio. An utterance is found by its key, the SHA-256 of its audio's
content, its segment and all that the features depend on besides, so that nothing in the cache is
ever out of date; what is damaged fails its checksum and is computed again. The folder may be
deleted at any time.
"""

import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blora_pyro.data.audio import audio_name, check_file
from blora_pyro.errors import UserError, printable, reason
from blora_pyro.files import cache_dir, parse_json

SUFFIX, HALF_WRITTEN = ".safetensors", ".new"
_TENSOR, _ROWS = "features", "rows"  # names in a shard: its tensor; key, CRC-32 and notes of each
_HOUR = 3600.0
_DAMAGED = (SafetensorError, LookupError, TypeError, ValueError, RecursionError)

CachedRow = tuple[Tensor, int]  # a block, (k, mels, frames), and the number of a row of it
About = list[Any]  # what is known of an utterance's audio, as JSON has it


class FeatureCache:
    """The cached log-mels of one way of computing them; without a folder, nothing is cached.

    Safe against kills and other processes: a shard gets its name when it is whole, and is never
    changed after that. A failure of the cache is never one of the caller.

    Attributes:
        about: what was stored beside the log-mels, by key.
    """

    def __init__(
        self, settings: str | None, on_note: Callable[[str], object] = lambda note: None
    ) -> None:
        """Index what is there.

        Args:
            settings: all that features depend on besides the audio; None caches nothing.
            on_note: called with one line if the cache cannot be written.
        """
        self._on_note = on_note
        self._index: dict[str, tuple[Path, int, int]] = {}  # shard, row and checksum of a key
        self.about: dict[str, About] = {}
        self._blocks: dict[Path, Tensor] = {}
        self._folder: Path | None = None  # to write to
        if settings is not None and (root := cache_dir()) is not None:
            self._folder = root / "features" / sha256(settings.encode()).hexdigest()[:16]
            for shard in _shards(self._folder):
                with self._dropped_if_damaged(shard), safe_open(shard, framework="pt") as file:
                    for row, (key, total, about) in enumerate(parse_json(file.metadata()[_ROWS])):
                        self._index[str(key)] = shard, row, total
                        self.about[str(key)] = about

    def find(self, keys: Iterable[str]) -> dict[str, CachedRow]:
        """Return those log-mels that are cached and whole."""
        found = {}
        for key in self._index.keys() & keys:
            if key not in self._index:  # another key's shard was damaged, and had this one
                continue
            shard, row, total = self._index[key]
            with self._dropped_if_damaged(shard):
                if shard not in self._blocks:
                    self._blocks[shard] = _map(shard)
                block = self._blocks[shard]
                if checksum(key, block[row], self.about[key]) != total:
                    raise ValueError(f"the checksum of {shard} is wrong")
                found[key] = block, row
        return found

    def store(
        self, features: Mapping[str, Tensor], about: Mapping[str, About]
    ) -> dict[str, CachedRow]:
        """Store log-mels by key, (mels, frames) each; return them, in memory or mapped.

        `about` is kept beside them, the same as `FeatureCache.about`.
        """
        if not features:
            return {}
        self.about |= {key: about[key] for key in features}
        keys = sorted(features)  # whoever computes them writes the same shard
        block = torch.stack([features[key] for key in keys])
        if self._folder is not None:
            shard = self._folder / (sha256(" ".join(keys).encode()).hexdigest()[:32] + SUFFIX)
            try:
                _write(shard, [(key, self.about[key]) for key in keys], block)
                block = _map(shard)
            except (OSError, SafetensorError) as error:
                self._on_note(
                    f"the feature cache {printable(self._folder)} can't be written "
                    f"({reason(error)}); going on without it"
                )
                self._folder = None
        return {key: (block, row) for row, key in enumerate(keys)}

    @contextmanager
    def _dropped_if_damaged(self, shard: Path) -> Iterator[None]:
        """Remove a shard that turns out damaged inside, and forget one that is gone."""
        try:
            yield
        except (OSError, *_DAMAGED) as error:
            self._blocks.pop(shard, None)
            self._index = {key: found for key, found in self._index.items() if found[0] != shard}
            if not isinstance(error, OSError):
                with suppress(OSError):
                    shard.unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    """List the shards; remove what killed processes have left half-written."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # there are none yet
        return []
    for path in entries:
        with suppress(OSError):
            if path.suffix == HALF_WRITTEN and time.time() - path.stat().st_mtime > _HOUR:
                path.unlink()
    return [path for path in entries if path.suffix == SUFFIX]


def _write(path: Path, keys: list[tuple[str, About]], block: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        (key, checksum(key, row, about), about)
        for (key, about), row in zip(keys, block, strict=True)
    ]
    content = save({_TENSOR: block}, {_ROWS: json.dumps(rows)})
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{HALF_WRITTEN}")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)  # it may be what fills the disk
        raise


def checksum(key: str, features: Tensor, about: About) -> int:
    """Return the CRC-32 of a key, its log-mels, (mels, frames), and what lies beside them."""
    start = f"{key} {tuple(features.shape)} {json.dumps(about)}".encode()
    return zlib.crc32(features.contiguous().numpy().data, zlib.crc32(start))


def _map(shard: Path) -> Tensor:
    """Return the block of a shard, mapped into memory and not read yet."""
    with safe_open(shard, framework="pt") as file:
        block = file.get_tensor(_TENSOR)
    if block.dtype != torch.float16 or block.ndim != 3:
        raise ValueError(f"{shard} holds {block.dtype} of shape {tuple(block.shape)}")
    return block


class Digests:
    """The SHA-256 of audio, of its file or bytes. A file is read once."""

    def __init__(self) -> None:
        """Start without any."""
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}  # state and digest by path

    def of(self, audio: Mapping[str, Any]) -> str | None:
        """Return the digest of {"path", "bytes"}; None if there is nothing to read."""
        if audio.get("bytes") is not None:
            return sha256(audio["bytes"]).hexdigest()
        path = str(audio.get("path"))
        if path not in self._known:
            try:
                check_file(path)
                state = _state(path)
                with open(path, "rb") as file:
                    self._known[path] = state, file_digest(file, "sha256").hexdigest()
            except (OSError, ValueError, UserError):
                return None
        return self._known[path][1]

    def check(self, audio: Mapping[str, Any]) -> None:
        """Refuse audio whose file has changed since its digest was taken.

        Raises:
            UserError: if it has.
        """
        if audio.get("bytes") is None:
            path = str(audio.get("path"))
            if path not in self._known or self._known[path][0] != _state(path):
                raise UserError(f"{audio_name(audio)} was changed while it was read; start again")


def _state(path: str) -> tuple[int, ...]:
    try:
        about = os.stat(path)
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns
