"""Recordings, long ones with few samples in memory, and the windows that Whisper decodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blora_pyro.data.audio import SAMPLING_RATE, Wave
from blora_pyro.errors import UserError
from blora_pyro.models.decoding import Piece
from blora_pyro.transcription.transcripts import TimedWord

MIN_AGAIN = 1.0  # seconds of silence from which on a window without a text is heard again
MIN_WINDOW = 0.1  # seconds; a shorter rest of a recording is left out

# Pauses, at which long audio is cut for a model without timestamp tokens
FRAME = SAMPLING_RATE // 100  # samples: 10 ms
MINUTE = 60 * SAMPLING_RATE  # samples
SMOOTHING_FRAMES = 5  # frames that a level is averaged over
MIN_PAUSE = 0.25  # seconds
PAUSE_MARGIN = 0.1  # seconds of a pause that are kept on either side of speech
DEPTH = 0.3  # a frame is quiet below this share of the way from the quiet to the loud level
CONTRAST = 10.0  # decibels between quiet and loud level below which no pause is detected

Span = tuple[int, int]  # first sample and end
Levels = npt.NDArray[np.float64]


class Samples(Protocol):
    """Samples, (samples,) at 16 kHz: an array, or a `StreamedWave`."""

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, span: slice, /) -> Wave:
        """Return the samples of a span."""


class StreamedWave:
    """Samples, as good as an array (samples,), of which slices are read from front to back.

    A slice that begins before the last one did is right, too, but everything is decoded anew.
    """

    def __init__(self, name: str, blocks: Callable[[], Iterator[Wave]]) -> None:
        """Decode everything once, for its length and to see whether it can be.

        Args:
            name: In messages.
            blocks: Begins anew with every call; see `data.stream_audio`.

        Raises:
            UserError: By `blocks`.
        """
        self.name, self._blocks = name, blocks
        self._length = sum(len(block) for block in blocks())
        self._restart()

    def _restart(self) -> None:
        self._rest, self._first = self._blocks(), 0
        self._held = np.zeros(0, np.float32)  # the samples from `_first` on

    def __len__(self) -> int:
        """The number of samples."""
        return self._length

    def __getitem__(self, span: slice) -> Wave:
        """Return the samples of a span.

        Raises:
            UserError: If the file has become shorter.
        """
        first, end, _ = span.indices(self._length)
        if first < self._first:
            self._restart()
        while self._first + len(self._held) < end:
            passed = min(first - self._first, len(self._held))
            block = next(self._rest, None)
            if block is None:
                raise UserError(f"{self.name} was changed while it was read; try again")
            self._held = np.concatenate([self._held[passed:], block])
            self._first += passed
        self._held, self._first = self._held[first - self._first :], first
        return self._held[: end - first].copy()


@dataclass(frozen=True, eq=False)
class Recording:
    """Audio to transcribe: its name, and its samples, (samples,) at 16 kHz."""

    name: str
    wave: Samples

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.wave) / SAMPLING_RATE

    def fixed_spans(self, window: float) -> list[Span]:
        """Spans of the whole recording, cut at pauses if it is longer than `window` seconds."""
        if self.duration <= window:
            return [(0, len(self.wave))]
        return cut_at_pauses(self.wave, window)

    def span_from(self, first: int, window: float) -> list[Span]:
        """The span of `window` seconds from sample `first` on; none if hardly anything is left."""
        end = min(first + round(window * SAMPLING_RATE), len(self.wave))
        return [(first, end)] if first == 0 or end - first > MIN_WINDOW * SAMPLING_RATE else []


@dataclass(eq=False)
class Window:
    """A span of a recording that is decoded at once, and its transcript.

    Attributes:
        recording: Index of the recording among those that are transcribed together.
        span: First sample and end.
        features: Log-mels (mels, frames), float16.
        timed: Whether the decoder is asked for timestamps.
        language: Code or codes; empty until known.
        prompt: Tokens of the decoder prompt.
        pieces: Decoded tokens with their times.
        times: Of the words of each piece, seconds from the window's start; None is unknown.
    """

    recording: int
    span: Span
    features: Tensor
    timed: bool
    language: str = ""
    prompt: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    times: list[list[TimedWord]] | None = None

    @property
    def start(self) -> float:
        """Start in the recording, seconds."""
        return self.span[0] / SAMPLING_RATE

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return (self.span[1] - self.span[0]) / SAMPLING_RATE

    @property
    def tokens(self) -> list[int]:
        """All decoded tokens."""
        return [token for piece in self.pieces for token in piece.tokens]

    def next_sample(self, timestamp_begin: int) -> int:
        """The sample at which the next window begins, if this one is timed.

        Two timestamps at the end mean that another segment begins that the window cuts off: the
        next window starts there. One without a text that begins with silence may hold the beginning
        of what the next would miss, and is heard again from its first sound on. Otherwise the next
        window starts where this one ends.
        """
        tokens = self.tokens
        silent = self._silent_samples() - round(MIN_PAUSE * SAMPLING_RATE)
        if not tokens and MIN_AGAIN * SAMPLING_RATE < silent < self.span[1] - self.span[0]:
            return self.span[0] + silent
        if len(tokens) > 1 and min(tokens[-2:]) >= timestamp_begin:
            finished = self.pieces[-1].end
            if MIN_WINDOW < finished < self.seconds:
                return self.span[0] + round(finished * SAMPLING_RATE)
        return self.span[1]

    def _silent_samples(self) -> int:
        """Return the number of samples before the first that sounds; 0 if none does."""
        is_sound = (self.features > self.features.amin()).any(0)
        return int(is_sound.int().argmax()) * FRAME


def batched(
    windows: Sequence[Window], size: int, length: Callable[[Window], float]
) -> Iterator[tuple[list[Window], Tensor]]:
    """Yield batches of up to `size` windows and their log-mels (n, mels, frames).

    A batch has either timed windows or others, of similar `length`: that of the transcript, or a
    proxy for it, because the longest decides a batch's time.
    """
    for timed in (False, True):
        rows = sorted((window for window in windows if window.timed == timed), key=length)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch, torch.stack([window.features for window in batch])


def cut_at_pauses(wave: Samples, window: float) -> list[Span]:
    """Cut audio into spans that fit the window, at pauses if there are any, by energy alone.

    A frame is quiet if it lies below `DEPTH` of the way from the 5th to the 95th percentile of the
    levels. Each stretch between two pauses is a span; one that is too long is cut repeatedly, at
    the quietest frame of the second half of its first window. Pauses are left out.

    Args:
        wave: (samples,) at 16 kHz.
        window: Seconds.
    """
    levels = _levels(wave)
    parts = []
    for first, end in _speech(levels):
        while end - first > (most := int(window * SAMPLING_RATE) // FRAME):
            half = first + most // 2
            cut = half + int(np.argmin(levels[half : first + most]))
            parts.append((first, cut))
            first = cut
        parts.append((first, end))
    return [(first * FRAME, min(end * FRAME, len(wave))) for first, end in parts]


def _levels(wave: Samples) -> Levels:
    """Level of every frame in decibels, averaged over `SMOOTHING_FRAMES` frames."""
    starts = range(0, len(wave), MINUTE)
    power = np.concatenate([_power(wave[start : start + MINUTE]) for start in starts])
    kernel = np.ones(SMOOTHING_FRAMES) / SMOOTHING_FRAMES
    smooth = np.convolve(np.pad(power, SMOOTHING_FRAMES // 2, mode="edge"), kernel, mode="valid")
    return 10 * np.log10(smooth + 1e-10)


def _power(wave: Wave) -> Levels:
    padded = np.pad(wave, (0, -len(wave) % FRAME)).astype(np.float64)
    return (padded.reshape(-1, FRAME) ** 2).mean(1)


def _speech(levels: Levels) -> list[tuple[int, int]]:
    """First frame and end of every stretch between pauses."""
    quiet, loud = np.percentile(levels, (5, 95))
    if loud - quiet < CONTRAST:
        return [(0, len(levels))]
    loud_frames = np.flatnonzero(levels > quiet + DEPTH * (loud - quiet))
    gaps = np.flatnonzero(np.diff(loud_frames) > MIN_PAUSE * SAMPLING_RATE / FRAME)
    margin = round(PAUSE_MARGIN * SAMPLING_RATE / FRAME)
    firsts = loud_frames[np.concatenate([[0], gaps + 1])] - margin
    ends = loud_frames[np.concatenate([gaps, [len(loud_frames) - 1]])] + 1 + margin
    return [
        (max(int(first), 0), min(int(end), len(levels)))
        for first, end in zip(firsts, ends, strict=True)
    ]
