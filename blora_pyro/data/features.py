"""Log-mel spectrograms: each computed once, in parallel, and cached.

The cache is not that of `datasets.map`, which was tried: its key is the path of an audio file, so
that a file that has changed gets its old features; a kill loses all that a call has computed; and a
data set with one row more or less is computed anew.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from blora_pyro.data import audio as audio_module
from blora_pyro.data import containers as containers_module
from blora_pyro.data.audio import SAMPLING_RATE, DecodedAudio, decode_audio
from blora_pyro.data.feature_cache import About, CachedRow, Digests, FeatureCache
from blora_pyro.data.rows import TOLERANCE, BadRow, OnBadRow, stop
from blora_pyro.errors import UserError

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

MARGIN = 50  # frames of 10 ms that are left: Whisper was never taught to stop right after a word
SHARD = 64  # utterances that are featurised, and written, at a time
_CODE = (audio_module.__file__, containers_module.__file__, __file__)  # what computes features

OnProgress = Callable[[int, int], object]  # called with the utterances done, and their number
OnNote = Callable[[str], object]  # called with a note of one line


class Heard(NamedTuple):
    """What is known of a row's audio.

    Attributes:
        content: a text that changes with the file or the segment.
        seconds: its length.
        notes: kind and message of what is worth knowing, see `DecodedAudio`.
    """

    content: str
    seconds: float
    notes: tuple[tuple[str, str], ...]


class Features:
    """Log-mels of n utterances, as good as one tensor (n, mels, frames), float16 on the CPU.

    They may lie in mapped files, of which only what is looked at is in memory.
    """

    def __init__(self, rows: Sequence[CachedRow], shape: tuple[int, int]) -> None:
        """Wrap rows of blocks; `shape` is (mels, frames)."""
        self._rows = list(rows)
        self.shape = torch.Size((len(self._rows), *shape))

    def __len__(self) -> int:
        """The number of utterances."""
        return len(self._rows)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> Tensor:
        """Return (mels, frames) for an index; for several (chosen, mels, frames), a copy."""
        if isinstance(chosen, slice):
            return self[range(len(self))[chosen]]
        if isinstance(chosen, int | np.integer):
            block, row = self._rows[chosen]
            return block[row]
        rows = [self[int(index)] for index in chosen]
        return torch.stack(rows) if rows else torch.empty(0, *self.shape[1:], dtype=torch.float16)


def log_mels(wave: npt.NDArray[np.float32], feature_extractor: "WhisperFeatureExtractor") -> Tensor:
    """Return the log-mels of samples at 16 kHz: (samples,) to (mels, frames), float16.

    Utterances go one at a time: in batches, windows of 30 s take four times as long.
    """
    out = feature_extractor([wave], sampling_rate=SAMPLING_RATE, return_tensors="np")
    return torch.from_numpy(out["input_features"][0]).half()


def featurise(
    waves: Iterable[tuple[str, npt.NDArray[np.float32]]],
    feature_extractor: "WhisperFeatureExtractor",
) -> Tensor:
    """Return the log-mels of n waves at 16 kHz with names, (n, mels, frames), float16.

    Raises:
        UserError: if audio is longer than the feature extractor's window.
    """
    features = []
    for name, wave in waves:
        if len(wave) > feature_extractor.n_samples:
            raise UserError(
                f"{name} lasts {len(wave) / SAMPLING_RATE:.2f} s, but the model "
                f"hears {feature_extractor.chunk_length} s at a time; split it"
            )
        features.append(log_mels(wave, feature_extractor))
    return torch.stack(features)


def trim(features: Tensor) -> Tensor:
    """Cut a batch of log-mels half a second after its longest utterance.

    A window is filled up with zeros, whose log-mels are the lowest value that those of the window
    have (Whisper's features are cut off at the loudest minus 80 dB). So an utterance ends with the
    last frame that has any other; silence of zeros at the end of a recording counts as filling.

    Whisper itself was trained on full windows, and its encoder attends to the filling, so that its
    output changes.

    Takes (batch, mels, frames), all frames of a window; returns a view of an even number of them.
    """
    end = MARGIN + int(sounding_frames(features).max())
    return features[..., : min(end + end % 2, features.shape[-1])]


def sounding_frames(features: Tensor) -> Tensor:
    """Return the frames up to the end of what sounds, (batch,), of log-mels as `trim` takes them.

    0 is a window of zeros.
    """
    is_sound = (features > features.amin((1, 2), keepdim=True)).any(1)
    return (is_sound * torch.arange(1, features.shape[-1] + 1, device=features.device)).amax(1)


def load_features(
    dataset: Dataset,
    feature_extractor: "WhisperFeatureExtractor",
    *,
    cache: bool = True,
    on_bad: OnBadRow = stop,
    on_progress: OnProgress = lambda done, total: None,
    on_note: OnNote = lambda note: None,
) -> tuple[Features, dict[int, Heard]]:
    """Return the features of n rows, from the cache where they are in it.

    They are bit by bit the same with and without cache, and whatever the number of cores.

    Args:
        dataset: n rows, with the columns of `read_manifest`.
        feature_extractor: the model's; its window is the longest audio allowed.
        cache: keep the features on disk and use what is there, see `feature_cache`.
        on_bad: called with the error of every row whose audio cannot be read or is longer than the
            window; where it does not raise, the row is left out.
        on_progress: called with the number of rows that are done, and of all.
        on_note: called with one line if the cache cannot be written.

    Returns:
        The features, and what is known of their audio by the number of the row.
    """
    settings = feature_settings(feature_extractor)
    store = FeatureCache(settings if cache else None, on_note)
    wanted = ["audio", "start", "end", "duration", "origin", "source"]
    rows = dataset.select_columns([name for name in wanted if name in dataset.column_names])
    digests = Digests()
    keys: dict[int, str] = {}  # by the number of the row
    contents: dict[int, str] = {}
    found: dict[str, CachedRow] = {}  # each is found or computed once, however many rows have it
    with _single_threaded(usable_cores()) as pool:
        for first in range(0, len(rows), SHARD):
            chunk = {n: rows[n] for n in range(first, min(first + SHARD, len(rows)))}
            digested = pool.map(digests.of, [row["audio"] or {} for row in chunk.values()])
            for (number, row), digest in zip(chunk.items(), digested, strict=True):
                content = f"{digest} {row['start']} {row['end']}"
                # Without settings nothing is sure to give the same features twice.
                key = sha256(f"{settings or number} {content}".encode()).hexdigest()
                contents[number], keys[number] = content, key
            found |= store.find({keys[number] for number in chunk} - found.keys())
            missing = {keys[n]: row for n, row in chunk.items() if keys[n] not in found}
            compute = partial(_compute, feature_extractor=feature_extractor, digests=digests)
            made = dict(zip(missing, pool.map(compute, missing.values()), strict=True))
            good = {key: one for key, one in made.items() if not isinstance(one, UserError)}
            about = {key: known for key, (_, known) in good.items()}
            found |= store.store({key: mels for key, (mels, _) in good.items()}, about)
            for number, row in chunk.items():
                if isinstance(error := made.get(keys[number]), UserError):
                    del contents[number]
                    on_bad(BadRow(row["origin"], str(error), row.get("source", 0)))
            on_progress(first + len(chunk), len(rows))
    shape = (feature_extractor.feature_size, feature_extractor.nb_max_frames)
    heard = {}
    stated = rows["duration"][:] if "duration" in rows.column_names else [None] * len(rows)
    for number, content in contents.items():
        seconds, notes = store.about[keys[number]]
        notes = {**dict(notes), **duration_notes({"duration": stated[number]}, seconds)}
        heard[number] = Heard(content, seconds, tuple(notes.items()))
    return Features([found[keys[number]] for number in contents], shape), heard


def featurise_row(
    row: Mapping[str, Any], feature_extractor: "WhisperFeatureExtractor"
) -> tuple[Tensor, Heard]:
    """Return the log-mels of a row, (mels, frames), float16, and what is known of its audio.

    Raises:
        UserError: if its audio cannot be read, or is longer than the feature extractor's window.
    """
    audio = decode_row(row, feature_extractor.chunk_length)
    return _log_mels_of(audio, feature_extractor), heard_of(row, audio, Digests())


def heard_of(row: Mapping[str, Any], audio: DecodedAudio, digests: Digests) -> Heard:
    """Return what is known of a row's decoded audio."""
    content = f"{digests.of(row['audio'] or {})} {row['start']} {row['end']}"
    notes = {**audio.notes, **duration_notes(row, audio.seconds)}
    return Heard(content, audio.seconds, tuple(notes.items()))


def decode_row(row: Mapping[str, Any], window: float | None) -> DecodedAudio:
    """Decode the audio of a row with the columns of `read_manifest`.

    Raises:
        UserError: see `decode_audio`; or if it is longer than `window` seconds, if that is known.
    """
    return decode_audio(row["audio"] or {}, row["start"], row["end"], max_seconds=window)


def duration_notes(row: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """Return a note if the duration that a row states is not that of its audio, else none."""
    stated = row.get("duration")
    if stated is None or abs(stated - seconds) <= TOLERANCE:
        return {}
    return {"duration": f"duration is {stated:.2f} s, the audio lasts {seconds:.2f} s"}


def _log_mels_of(heard: DecodedAudio, feature_extractor: "WhisperFeatureExtractor") -> Tensor:
    mels = log_mels(heard.resampled(), feature_extractor)
    if not mels.isfinite().all():
        raise UserError(f"{heard.name} has features that are not finite numbers; drop it")
    return mels


def _compute(
    row: Mapping[str, Any], feature_extractor: "WhisperFeatureExtractor", digests: Digests
) -> tuple[Tensor, About] | UserError:
    """Return log-mels, and length and notes of their audio; or what is wrong with it."""
    try:
        heard = decode_row(row, feature_extractor.chunk_length)
        mels = _log_mels_of(heard, feature_extractor)
        digests.check(row["audio"])
    except UserError as error:
        return error
    return mels, [heard.seconds, [*map(list, heard.notes.items())]]


def feature_settings(feature_extractor: "WhisperFeatureExtractor") -> str | None:
    """Return all that features depend on besides the audio, as text; None if chance is part of it.

    That is the feature extractor's settings and filters, the code that computes, and the libraries
    and the kind of processor that it runs on.
    """
    own_class = type(feature_extractor) is not transformers.WhisperFeatureExtractor
    if own_class or feature_extractor.dither:  # a user's class may do anything
        return None
    names = ("processor_class", "feature_extractor_type")
    filters = np.asarray(feature_extractor.mel_filters)
    libraries = (av, np, soundfile, soxr, torch, transformers)
    about = {
        "settings": {k: v for k, v in feature_extractor.to_dict().items() if k not in names},
        "filters": [str(filters.dtype), filters.shape, sha256(filters.tobytes()).hexdigest()],
        "code": [sha256(Path(file).read_bytes()).hexdigest() for file in _CODE],
        "libraries": [f"{one.__name__} {one.__version__}" for one in libraries],
        "decoder": soundfile.__libsndfile_version__,
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    return json.dumps(about, sort_keys=True, default=str)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch uses one core each; processes would take seconds to start."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what later threads start with
