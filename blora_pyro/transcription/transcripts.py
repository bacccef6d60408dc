"""Transcripts with segments and words, as JSON and as SubRip (.srt) and WebVTT (.vtt) subtitles.

WebVTT: https://www.w3.org/TR/webvtt1/. SubRip has no standard; all players accept a number, a line
of times with commas, lines of text and an empty line.
"""

import html
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import regex

from blora_pyro.languages import UNSPACED, join_texts

LINE_COLUMNS = 42  # per line; a Han character takes two
CUE_LINES = 2  # per cue
MIN_CUE = 1  # milliseconds
SILENCE = -0.4  # log-mel in which nothing can be heard; that of white noise 71 dB below full scale

# A line may end at white space and on either side of a character of a script without spaces, as
# `metrics.words` has them, but not after an opening bracket or a vowel sign that is written before
# its consonant, nor before closing punctuation and signs that lean on what is before them.
_OPENING = r"[\p{Ps}\p{Pi}เ-ไເ-ໄ]"
_CLOSING = r"[\p{M}\p{Pe}\p{Pf}\p{Lm}、。，．：；！？…・·၊။។ฯຯะาำๅະາຳ་།ﾞﾟ]"
_PART = regex.compile(
    rf"\s*(?:{_OPENING}*[{UNSPACED}]|[^\s{UNSPACED}]+?(?=\s|$|{_OPENING}*[{UNSPACED}])){_CLOSING}*"
)


@dataclass(frozen=True)
class Word:
    """A word (a Han character counts as one) with its confidence from K draws, see `words`.

    Attributes:
        text: The word as in the transcript, punctuation included.
        agreement: Share of the draws whose own transcripts have the word at this position.
        log_prob: Its log-probability given the words before it, mean over the draws, nats.
    """

    text: str
    agreement: float
    log_prob: float

    @property
    def confidence(self) -> float:
        """Estimated probability that the word is correct: (agreement + exp(log_prob)) / 2."""
        return (self.agreement + math.exp(self.log_prob)) / 2

    def to_json(self) -> dict[str, Any]:
        """The word for JSON, rounded to four digits."""
        names = ("agreement", "log_prob", "confidence")
        return {"text": self.text, **{name: round(getattr(self, name), 4) for name in names}}


@dataclass(frozen=True)
class TimedWord:
    """A word, punctuation included, and when it is said, in seconds.

    `probability` is the mean of its tokens', but for those of punctuation.
    """

    text: str
    start: float
    end: float
    probability: float

    def moved(self, seconds: float) -> "TimedWord":
        """Return it said so much later."""
        return replace(self, start=self.start + seconds, end=self.end + seconds)

    def to_json(self) -> dict[str, Any]:
        """The word for JSON; times to the millisecond."""
        times = {"start": round(self.start, 3), "end": round(self.end, 3)}
        return {"text": self.text, **times, "probability": round(self.probability, 4)}


@dataclass(frozen=True)
class Segment:
    """The transcript of a part of a recording, from `start` to `end` in seconds.

    `words` are those of the text with their confidences, None without draws; `times` the same with
    their times, None unless they are asked for.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None
    times: tuple[TimedWord, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The segment for JSON; times to the millisecond."""
        times = {"start": round(self.start, 3), "end": round(self.end, 3)}
        parts = [one for one in (self.times, self.words) if one is not None]
        words = [
            {name: value for one in each for name, value in one.to_json().items()}
            for each in zip(*parts, strict=True)
        ]
        return {**times, "text": self.text} | ({"words": words} if parts else {})


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording.

    Attributes:
        audio: Path of the recording.
        language: The language given or detected: "de", or "de-en" if code-switched; empty if none
            is given and nothing can be heard.
        duration: Seconds.
        segments: Non-empty segments, in order.
        engine: What decoded it, `torch` or `ctranslate2`.
    """

    audio: str
    language: str
    duration: float
    segments: tuple[Segment, ...]
    engine: str = "torch"

    @property
    def text(self) -> str:
        """The whole transcript in one line, joined as its script is written."""
        return join_texts(segment.text for segment in self.segments)

    def to_json(self) -> Mapping[str, Any]:
        """The transcript for JSON."""
        return {
            "audio": self.audio,
            "language": self.language,
            "duration": round(self.duration, 3),
            "engine": self.engine,
            "text": self.text,
            "segments": [segment.to_json() for segment in self.segments],
        }


@dataclass(frozen=True)
class Cue:
    """A subtitle: lines of text, from `start` to a later `end` in milliseconds."""

    start: int
    end: int
    lines: tuple[str, ...]


def srt(transcript: Transcript) -> str:
    """The content of a SubRip file."""
    return "".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n"
        + "\n".join(cue.lines).replace("-->", "→")
        + "\n\n"
        for number, cue in enumerate(cues(transcript.segments), 1)
    )


def vtt(transcript: Transcript) -> str:
    """The content of a WebVTT file."""
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n"
        + html.escape("\n".join(cue.lines), quote=False)
        + "\n\n"
        for cue in cues(transcript.segments)
    )


def cues(segments: Iterable[Segment]) -> Iterator[Cue]:
    """Yield cues that do not overlap, in order.

    A cue lasts from its first word to its last, if the words' times are known. Otherwise a segment
    that needs several cues gives each a share of its time in proportion to its columns.
    """
    shown = 0
    for segment in segments:
        lines = _wrap(segment.text)
        groups = [tuple(lines[i : i + CUE_LINES]) for i in range(0, len(lines), CUE_LINES)]
        if segment.times:
            for group, (start, end) in zip(groups, _spoken(groups, segment.times), strict=True):
                start = max(start, shown)
                shown = max(end, start + MIN_CUE)
                yield Cue(start, shown, group)
            continue
        widths = [max(1, sum(map(_width, group))) for group in groups]
        start, end = (round(1000 * time) for time in (segment.start, segment.end))
        start = max(start, shown)
        end = max(end, start + MIN_CUE * len(groups))
        spare, done = end - start - MIN_CUE * len(groups), 0
        for index, (group, width) in enumerate(zip(groups, widths, strict=True), 1):
            done += width
            stop = start + MIN_CUE * index + spare * done // sum(widths)
            yield Cue(max(shown, start), stop, group)
            shown = stop


def _spoken(
    groups: Iterable[tuple[str, ...]], words: Sequence[TimedWord]
) -> Iterator[tuple[int, int]]:
    """Yield when each group of lines is said, in milliseconds, by the letters of the words."""
    ends = [*accumulate(len("".join(word.text.split())) for word in words)]
    first = 0
    for group in groups:
        last = first + len("".join("".join(group).split())) - 1
        places = (min(bisect_right(ends, at), len(words) - 1) for at in (first, last))
        begin, end = (words[place] for place in places)
        yield round(1000 * begin.start), round(1000 * end.end)
        first = last + 1


def _wrap(text: str) -> list[str]:
    """Lines of at most `LINE_COLUMNS` columns; only a single wider word exceeds that."""
    lines: list[str] = []
    for part in _PART.findall(" ".join(text.split())):
        if lines and _width(lines[-1] + part) <= LINE_COLUMNS:
            lines[-1] += part
        else:
            lines.append(part.strip())
    return lines


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def _time(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"
