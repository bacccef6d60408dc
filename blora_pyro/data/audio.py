"""Audio files and arrays as Whisper hears them: one channel, 16 kHz."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from blora_pyro.errors import UserError

SAMPLING_RATE = 16_000  # Hz


def read_audio(
    audio: Mapping[str, Any], sampling_rate: int = SAMPLING_RATE
) -> npt.NDArray[np.float32]:
    """Read audio as one channel at `sampling_rate` Hz.

    Args:
        audio: {"path", "bytes"}, an encoded file that soundfile knows (wav, flac, ogg with vorbis
            or opus, mp3), the bytes first; or {"array", "sampling_rate"}, (samples,) floats.
        sampling_rate: of the result, in Hz.

    Returns:
        The samples, (samples,), the channels averaged; full scale is [-1, 1].

    Raises:
        UserError: if the audio cannot be read, is empty, or is not finite.
    """
    name = audio_name(audio)
    if audio.get("array") is not None:
        wave, rate = np.asarray(audio["array"]), int(audio["sampling_rate"])
        if wave.ndim != 1 or wave.dtype.kind != "f":
            raise UserError(
                f"{name} is an array of {wave.dtype}, shape {wave.shape}; "
                "give (samples,) floating-point numbers in [-1, 1]"
            )
        wave = wave.astype(np.float32)
    else:
        wave, rate = _decode(audio, name)
    if not np.isfinite(wave).all():
        raise UserError(f"{name} has samples that are not finite numbers; write it anew")
    if rate != sampling_rate:
        wave = soxr.resample(wave, rate, sampling_rate)
    if not len(wave):
        raise UserError(f"{name} is empty; drop it")
    return wave


def audio_name(audio: Mapping[str, Any]) -> str:
    """Return what messages call this audio: its path, else "audio without a path"."""
    return str(audio.get("path") or "audio without a path")


def _decode(audio: Mapping[str, Any], name: str) -> tuple[npt.NDArray[np.float32], int]:
    try:
        data = audio.get("bytes")
        # Opened here, since soundfile would ask for a rate where a name ends in .raw.
        with io.BytesIO(data) if data is not None else open(audio["path"], "rb") as file:
            wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    # RuntimeError is libsndfile's; the others: neither bytes nor path, or a path that cannot be.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {name} as wav, flac, ogg or mp3: {reason}") from error
    return wave.mean(axis=1), rate
