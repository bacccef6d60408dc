"""Recordings, and the windows that a Whisper hears of them, one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blora_pyro.data.audio import SAMPLING_RATE, Wave
from blora_pyro.models.decoding import Piece
from blora_pyro.transcription.pauses import cut_at_pauses

LEAST = 0.1  # seconds that are worth a window

Span = tuple[int, int]  # first sample and end


@dataclass(frozen=True, eq=False)
class Recording:
    """Audio to transcribe: its name, and its samples, (samples,) at 16 kHz."""

    name: str
    wave: Wave

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.wave) / SAMPLING_RATE

    def fixed_spans(self, window: float) -> list[Span]:
        """All of it, cut at pauses if it is longer than the window (in seconds)."""
        if self.duration <= window:
            return [(0, len(self.wave))]
        return cut_at_pauses(self.wave, window)

    def span_from(self, first: int, window: float) -> list[Span]:
        """One window from a sample on; none where hardly anything is left."""
        end = min(first + round(window * SAMPLING_RATE), len(self.wave))
        return [(first, end)] if first == 0 or end - first > LEAST * SAMPLING_RATE else []


@dataclass(eq=False)
class Window:
    """A stretch of a recording that the model hears at once, and what it says.

    Attributes:
        recording: The recording's place among those that are transcribed together.
        span: First sample and end.
        features: Log-mels (mels, frames), float16.
        timed: Whether the decoder is asked for timestamps.
        language: Code or codes; empty until it is known.
        prompt: The decoder's.
        pieces: What was said.
    """

    recording: int
    span: Span
    features: Tensor
    timed: bool
    language: str = ""
    prompt: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def start(self) -> float:
        """Seconds."""
        return self.span[0] / SAMPLING_RATE

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.span[1] - self.span[0]) / SAMPLING_RATE

    @property
    def tokens(self) -> list[int]:
        """All that was said."""
        return [token for piece in self.pieces for token in piece.tokens]

    def next_sample(self, timestamp_begin: int) -> int:
        """Where the next window begins, if this one is timed.

        Two timestamps at the end say that another segment begins, which the window does not hold as
        a whole: it is heard again from there. Otherwise the window is done with.
        """
        tokens = self.tokens
        if len(tokens) > 1 and min(tokens[-2:]) >= timestamp_begin:
            finished = self.pieces[-1].end
            if LEAST < finished < self.seconds:
                return self.span[0] + round(finished * SAMPLING_RATE)
        return self.span[1]


def batched(
    windows: Sequence[Window], size: int, length: Callable[[Window], float]
) -> Iterator[tuple[list[Window], Tensor]]:
    """Windows in batches of timed ones or of others, of like length, with their log-mels.

    Args:
        windows: In any order.
        size: Of a batch, at most.
        length: Of what is said in a window, or a guess: the longest decides how long a batch takes.
    """
    for timed in (False, True):
        rows = sorted((window for window in windows if window.timed == timed), key=length)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch, torch.stack([window.features for window in batch])
