"""What was said in a recording: segments and words, when, and how sure the posterior is of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Word:
    """A word (a Han character is one) and what K posterior draws make of it; see `confidence`.

    Attributes:
        text: As in the transcript, punctuation included.
        agreement: Share of the draws whose own transcripts have the word at this place.
        log_prob: Mean over the draws of its log-probability after what was said before, nats.
    """

    text: str
    agreement: float
    log_prob: float

    @property
    def confidence(self) -> float:
        """How sure to be that the word is right: (agreement + exp(log_prob)) / 2."""
        return (self.agreement + math.exp(self.log_prob)) / 2

    def to_json(self) -> dict[str, Any]:
        """For JSON, rounded."""
        figures = {"agreement": self.agreement, "log_prob": self.log_prob}
        figures["confidence"] = self.confidence
        return {"text": self.text, **{name: round(value, 4) for name, value in figures.items()}}


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start: Seconds.
        end: Seconds.
        text: What was said.
        words: Its words with their confidences; None where no draws were asked for.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """For JSON; times to the millisecond."""
        row: dict[str, Any] = {"start": round(self.start, 3), "end": round(self.end, 3)}
        row["text"] = self.text
        if self.words is not None:
            row["words"] = [word.to_json() for word in self.words]
        return row


@dataclass(frozen=True)
class Transcript:
    """A recording's transcript.

    Attributes:
        audio: The recording's path.
        language: What the decoder was told, or detected: "de", or "de-en" if code-switched.
        duration: Seconds.
        segments: In order, none of them empty.
    """

    audio: str
    language: str
    duration: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """All of it, in one line."""
        return " ".join(segment.text for segment in self.segments)

    def to_json(self) -> Mapping[str, Any]:
        """For JSON."""
        return {
            "audio": self.audio,
            "language": self.language,
            "duration": round(self.duration, 3),
            "text": self.text,
            "segments": [segment.to_json() for segment in self.segments],
        }
