"""Audio files and arrays, read as Whisper takes them: one channel, 16 kHz."""

import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soxr

from blora_pyro.data.containers import Block, DamagedAudio, Sound, opened
from blora_pyro.errors import UserError, printable, reason

SAMPLING_RATE = 16_000  # Hz
SLACK = 0.05  # seconds that a segment may end after its file: manifests round to a tenth
LOUDEST = 10.0  # times full scale that samples may reach, which decoders and filters overshoot
CLIPPED = 0.001  # share of the samples that reach full scale from which on audio is called clipped
CANCELLED = 0.1  # of what a lone channel would leave, that channels leave which cancel each other
SILENT = 0.001  # of full scale, -60 dB, that the swing of silent audio nowhere reaches

Wave = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DecodedAudio:
    """Audio at its own rate, the channels averaged.

    Attributes:
        name: in messages.
        wave: (samples,); full scale is [-1, 1].
        rate: Hz.
        channels: number of them in the file.
        notes: messages by kind, "clipped" or "silent", of what is worth knowing.
    """

    name: str
    wave: Wave
    rate: int
    channels: int
    notes: dict[str, str]

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.wave) / self.rate

    def resampled(self, rate: int = SAMPLING_RATE) -> Wave:
        """Return the samples, (samples,), at another rate; `UserError` if that can't be."""
        if self.rate == rate:
            return self.wave
        try:
            wave = soxr.resample(self.wave, self.rate, rate)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot resample {self.name} from {self.rate} Hz: {reason(error)}"
            ) from error
        if not len(wave):
            raise UserError(f"{self.name} is empty; drop it")
        return wave


def read_audio(
    audio: Mapping[str, Any],
    sampling_rate: int = SAMPLING_RATE,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> Wave:
    """Return the samples of `decode_audio`, (samples,), at `sampling_rate` Hz."""
    return decode_audio(audio, start, end, max_seconds).resampled(sampling_rate)


def decode_audio(
    audio: Mapping[str, Any],
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> DecodedAudio:
    """Decode audio, or a segment of it.

    Only the segment is kept in memory. Where seeking is not exact (ogg/vorbis, and all that FFmpeg
    reads), what lies before it is decoded too.

    Args:
        audio: {"path", "bytes"}, an encoded file (wav, flac, ogg with vorbis or opus, mp3, m4a,
            aac, webm, ...), the bytes first; or {"array", "sampling_rate"}, (samples,) floats.
        start: of the segment, in seconds; None is the beginning.
        end: of the segment, in seconds; None is the end.
        max_seconds: refuse more than this; no more of it is decoded.

    Raises:
        UserError: if the audio cannot be read, is empty, cut off, too long, not finite or beyond
            all scale, or lacks the segment.
    """
    name = audio_name(audio)
    if audio.get("array") is not None:
        wave, rate = check_array(audio)
        _check_segment(name, len(wave) / rate, start, end, max_seconds)
        wave = wave[round((start or 0) * rate) : None if end is None else round(end * rate)]
        channels = 1
    else:
        with _opened(audio) as sound:
            rate, channels = sound.rate, sound.channels
            if sound.frames is not None:  # so that nothing is decoded in vain
                _check_segment(name, sound.frames / rate, start, end, max_seconds)
            wave = _segment(sound, name, start, end, max_seconds)
    return DecodedAudio(name, wave, rate, channels, _check_samples(name, wave))


def stream_audio(audio: Mapping[str, Any], sampling_rate: int = SAMPLING_RATE) -> Iterator[Wave]:
    """Yield the samples of `read_audio` of a file in blocks, (samples,) each.

    Raises:
        UserError: where `read_audio` would; what comes late in the file is found late.
    """
    name = audio_name(audio)
    with _opened(audio) as sound:
        resampler = soxr.ResampleStream(sound.rate, sampling_rate, 1)
        waiting: list[Wave] = []
        mixer = _Mixer()
        for _, block in sound.blocks():
            waiting.append(mixer.mix(block))
            if sum(map(len, waiting)) >= sound.rate:  # FFmpeg's blocks are short
                wave, waiting = np.concatenate(waiting), []
                _check_samples(name, wave)
                yield resampler.resample_chunk(wave)
        wave = np.concatenate(waiting) if waiting else np.zeros(0, np.float32)
        if waiting or not sound.position:
            _check_samples(name, wave)
        mixer.check(name)
        yield resampler.resample_chunk(wave, last=True)


def audio_name(audio: Mapping[str, Any]) -> str:
    """Return the name of audio in messages."""
    return printable(audio.get("path") or "audio without a path")


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file before it is opened: a device may do anything, a pipe waits.

    Raises:
        UserError: if it does not exist, or is something else.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "that cannot be a path"
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise UserError(
            f"the audio file '{printable(path)}' "
            + ("does not exist" if gone else f"cannot be read: {why}")
        ) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"the audio file '{printable(path)}' is no file, but a folder or a device")


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


@contextmanager
def _opened(audio: Mapping[str, Any]) -> Iterator[Sound]:
    """Open a file, {"path", "bytes"}; what goes wrong with it inside is a `UserError`."""
    name = audio_name(audio)
    data: Any = audio.get("bytes")
    path: Any = audio.get("path")
    if data is None and path is None:
        raise UserError(f"cannot read {name}: there are neither bytes nor an array; drop it")
    if data is None:
        check_file(path)
    try:
        with io.BytesIO(data) if data is not None else open(path, "rb") as file:
            with opened(file) as sound:
                yield sound
    except DamagedAudio as error:
        raise UserError(f"{name} is {error}; write it anew") from error
    # RuntimeError is libsndfile's; TypeError and ValueError are of what cannot be.
    except (OSError, RuntimeError, TypeError, ValueError, av.error.FFmpegError) as error:
        why = getattr(error, "error_string", None) or getattr(error, "strerror", None)
        raise UserError(
            f"cannot read {name} as wav, flac, ogg, mp3, m4a, aac or webm: {why or reason(error)}"
        ) from error


def _check_segment(
    name: str, seconds: float, start: float | None, end: float | None, max_seconds: float | None
) -> None:
    """Refuse a segment that is not in audio of `seconds`, or longer than `max_seconds`."""
    first, last = start or 0.0, seconds if end is None else end
    segmented = start is not None or end is not None
    if segmented and not (0 <= first < last <= seconds + SLACK and first < seconds):
        raise UserError(
            f"{name} lasts {seconds:.2f} s, so it has no segment from {first:g} s to {last:g} s"
        )
    if max_seconds is not None and min(last, seconds) - first > max_seconds:
        raise _too_long(name, f"{min(last, seconds) - first:.2f} s", segmented, max_seconds)


def _too_long(name: str, lasts: str, segmented: bool, max_seconds: float) -> UserError:
    advice = "shorten the segment" if segmented else "split it, or give start and end"
    return UserError(
        f"{name} lasts {lasts}, but the model hears {max_seconds:g} s at a time; {advice}"
    )


def _segment(
    sound: Sound, name: str, start: float | None, end: float | None, max_seconds: float | None
) -> Wave:
    """Return a segment, (frames,), the channels averaged; no more than it is decoded."""
    first = round((start or 0) * sound.rate)
    most = math.inf if max_seconds is None else first + math.ceil(max_seconds * sound.rate)
    last = most + 1 if end is None else min(round(end * sound.rate), most + 1)
    blocks: list[Wave] = []
    mixer = _Mixer()
    for place, block in sound.blocks(first):
        blocks.append(mixer.mix(block[max(0, first - place) :]))
        if sound.position >= last:
            break
    else:  # the end of the file, so that its length is known
        _check_segment(name, sound.position / sound.rate, start, end, max_seconds)
    if max_seconds is not None and last > most and sound.position > most:
        raise _too_long(name, f"more than {max_seconds:g} s", start is not None, max_seconds)
    mixer.check(name)
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return wave if math.isinf(last) else wave[: int(last) - first]


class _Mixer:
    """Averages channels, and tells whether nothing is left of them."""

    def __init__(self) -> None:
        self._powers: npt.NDArray[np.float64] | float = 0.0
        self._mixed = 0.0

    def mix(self, block: Block) -> Wave:
        """Return the mean of the channels, (frames,), of (frames, channels)."""
        with np.errstate(invalid="ignore", over="ignore"):  # not finite then, and refused
            wave: Wave = block.mean(axis=1)
            if block.shape[1] > 1:
                self._powers = self._powers + np.square(block, dtype=np.float64).sum(axis=0)
                self._mixed += float(np.square(wave, dtype=np.float64).sum())
        return wave

    def check(self, name: str) -> None:
        """Refuse channels of which one is the other, turned round, so that silence is left."""
        if isinstance(self._powers, float):
            return
        share = (CANCELLED / len(self._powers)) ** 2
        if 0 <= self._mixed < share * self._powers.max():
            raise UserError(
                f"{name} has channels that cancel each other where they are averaged; write one of "
                "them alone"
            )


def _check_samples(name: str, wave: Wave) -> dict[str, str]:
    """Return what is worth knowing of samples, or raise `UserError` where they are unusable."""
    if not len(wave):
        raise UserError(f"{name} is empty; drop it")
    loudest = float(np.abs(wave).max())
    if not math.isfinite(loudest):
        raise UserError(f"{name} has samples that are not finite numbers; write it anew")
    if loudest > LOUDEST:
        raise UserError(
            f"{name} has samples up to {loudest:,.0f}, but full scale is 1; divide them by the "
            "full scale of what they were, such as 32,768"
        )
    share = float((np.abs(wave) >= 0.999).mean())
    if share >= CLIPPED:
        return {"clipped": f"{share:.1%} of the samples are at full scale or beyond it"}
    if np.ptp(wave) < 2 * SILENT:  # of a constant, too
        return {"silent": f"all samples are within {SILENT:g} of full scale of one level"}
    return {}
