"""Audio files and arrays, read as Whisper takes them: one channel, 16 kHz."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from blora_pyro.errors import UserError, printable, reason

SAMPLING_RATE = 16_000  # Hz
SLACK = 0.01  # seconds that a segment may end after its file: manifests round
CUT_OFF = 0.1  # seconds that an mp3's header may promise too much; it estimates
BLOCK = 1 << 16  # frames decoded at a time

Wave = npt.NDArray[np.float32]


def read_audio(
    audio: Mapping[str, Any],
    sampling_rate: int = SAMPLING_RATE,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> Wave:
    """Read audio, or a segment of it, as one channel at `sampling_rate` Hz.

    Only the segment is kept in memory. In mp3 and ogg/vorbis, whose seeking is not exact, what lies
    before it is decoded too.

    Args:
        audio: {"path", "bytes"}, an encoded file that soundfile knows (wav, flac, ogg with vorbis
            or opus, mp3), the bytes first; or {"array", "sampling_rate"}, (samples,) floats.
        sampling_rate: of the result, in Hz.
        start: of the segment, in seconds; None is the beginning.
        end: of the segment, in seconds; None is the end.
        max_seconds: refuse more than this, before any of it is decoded.

    Returns:
        The samples, (samples,), the channels averaged; full scale is [-1, 1].

    Raises:
        UserError: if the audio cannot be read, is empty, cut off, too long or not finite, or lacks
            the segment.
    """
    name = audio_name(audio)
    segment = partial(_segment, name, start=start, end=end, max_seconds=max_seconds)
    if audio.get("array") is not None:
        wave, rate = check_array(audio)
        seconds = len(wave) / rate
        first, count = segment(seconds, rate)
        wave = wave[first : first + count]
    else:
        with _opened(audio) as sound:
            rate, seconds = sound.samplerate, sound.frames / sound.samplerate
            first, count = segment(seconds, rate)
            wave = _read_frames(sound, first, count)
    if len(wave) < count - CUT_OFF * rate:
        raise UserError(
            f"{name} is cut off {(count - len(wave)) / rate:.2f} s before the end of the "
            f"{seconds:.2f} s that it should last; write it anew"
        )
    if not np.isfinite(wave).all():
        raise UserError(f"{name} has samples that are not finite numbers; write it anew")
    if rate != sampling_rate:
        try:
            wave = soxr.resample(wave, rate, sampling_rate)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot resample {name} from {rate} Hz: {reason(error)}") from error
    if not len(wave):
        raise UserError(f"{name} is empty; drop it")
    return wave


@dataclass(frozen=True)
class AudioHeader:
    """The header of an audio file: sampling rate in Hz, channels, length in seconds."""

    sampling_rate: int
    channels: int
    seconds: float


def read_header(audio: Mapping[str, Any]) -> AudioHeader:
    """Read the header of a file, {"path", "bytes"}, or raise `UserError`; nothing is decoded."""
    with _opened(audio) as sound:
        return AudioHeader(sound.samplerate, sound.channels, sound.frames / sound.samplerate)


def audio_name(audio: Mapping[str, Any]) -> str:
    """Return the name of audio in messages."""
    return printable(audio.get("path") or "audio without a path")


def check_array(audio: Mapping[str, Any]) -> tuple[Wave, int]:
    """Return samples, (samples,), and rate in Hz of {"array", "sampling_rate"}, or `UserError`."""
    name = audio_name(audio)
    try:
        wave = np.asarray(audio["array"])
    except ValueError as error:  # a ragged list
        raise UserError(f"{name} is no array of numbers: {reason(error)}") from error
    if wave.ndim != 1 or (wave.dtype.kind != "f" and wave.size):
        raise UserError(
            f"{name} is an array of {wave.dtype}, shape {wave.shape}; "
            "give (samples,) floating-point numbers in [-1, 1]"
        )
    rate = audio.get("sampling_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 0 < rate < 1e7:
        raise UserError(f"{name} has the sampling_rate {printable(repr(rate), 40)}; give it in Hz")
    with np.errstate(over="ignore"):  # then infinite, and refused
        return wave.astype(np.float32), int(rate)


class _SoundFile(soundfile.SoundFile):
    """An audio file whose blocks are read one behind the other.

    soundfile seeks after every read, which in mp3 and ogg/vorbis is not exact (libsndfile issue
    885): blocks would not fit together.
    """

    def seekable(self) -> bool:
        """Tell whether seeking is possible and exact."""
        inexact = self.format == "MP3" or self.subtype == "VORBIS"
        return not inexact and super().seekable()


@contextmanager
def _opened(audio: Mapping[str, Any]) -> Iterator[soundfile.SoundFile]:
    """Open a file, {"path", "bytes"}; what goes wrong with it inside is a `UserError`."""
    name = audio_name(audio)
    data: Any = audio.get("bytes")
    path: Any = audio.get("path")
    if data is None and path is None:
        raise UserError(f"cannot read {name}: there are neither bytes nor an array; drop it")
    try:
        # Opened here, since soundfile would ask for a rate where a name ends in .raw.
        with (
            io.BytesIO(data) if data is not None else open(path, "rb") as file,
            _SoundFile(file) as sound,
        ):
            yield sound
    # RuntimeError is libsndfile's; the others: a path that cannot be.
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        why = getattr(error, "error_string", None) or reason(error)
        raise UserError(f"cannot read {name} as wav, flac, ogg or mp3: {why}") from error


def _segment(
    name: str,
    seconds: float,
    rate: int,
    start: float | None,
    end: float | None,
    max_seconds: float | None,
) -> tuple[int, int]:
    """Return the first frame and the number of frames of a segment of audio of `seconds`."""
    first, last = start or 0.0, seconds if end is None else end
    segmented = start is not None or end is not None
    if segmented and not (0 <= first < last <= seconds + SLACK and first < seconds):
        raise UserError(
            f"{name} lasts {seconds:.2f} s, so it has no segment from {first:g} s to {last:g} s"
        )
    last = min(last, seconds)
    if max_seconds is not None and last - first > max_seconds:
        advice = "shorten the segment" if segmented else "split it, or give start and end"
        raise UserError(
            f"{name} lasts {last - first:.2f} s, but the model hears {max_seconds:g} s at a time; "
            f"{advice}"
        )
    return round(first * rate), round(last * rate) - round(first * rate)


def _read_frames(sound: soundfile.SoundFile, first: int, count: int) -> Wave:
    """Return (count,) frames from the first, the channels averaged; fewer if there are no more."""
    if first and sound.seekable():
        sound.seek(first)
        first = 0
    blocks, position = [], 0
    while position < first + count:
        block = sound.read(min(BLOCK, first + count - position), dtype="float32", always_2d=True)
        if not len(block):
            break
        with np.errstate(invalid="ignore", over="ignore"):  # not finite then, and refused
            blocks.append(block[max(0, first - position) :].mean(axis=1))
        position += len(block)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
