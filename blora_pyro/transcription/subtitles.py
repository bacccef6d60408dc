"""Transcripts as subtitles: SubRip (.srt) and WebVTT (.vtt).

WebVTT: https://www.w3.org/TR/webvtt1/. SubRip has no standard; what all players take is a number, a
line of times with commas, and lines of text, then an empty line.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blora_pyro.transcription.transcripts import Segment, Transcript

COLUMNS = 42  # of a line; a Han character takes two
LINES = 2  # of a cue
LEAST = 1  # milliseconds that a cue is shown

# Where a line may end: at white space, and on either side of a character of a script without any,
# but not before a mark that closes something.
_WIDE = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U0001b000-\U0003fffd]"
_CLOSING = r"[、。，．：；！？」』）】》\u0300-\u036f]"
_PART = re.compile(rf"\s*(?:{_WIDE}|(?:(?!{_WIDE})\S)+){_CLOSING}*")


@dataclass(frozen=True)
class Cue:
    """What is shown at a time.

    Attributes:
        start: Milliseconds.
        end: Milliseconds, later than the start.
        lines: Of its text.
    """

    start: int
    end: int
    lines: tuple[str, ...]


def srt(transcript: Transcript) -> str:
    """A SubRip file."""
    return "".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{_arrowless(cue)}\n\n"
        for number, cue in enumerate(cues(transcript.segments), 1)
    )


def vtt(transcript: Transcript) -> str:
    """A WebVTT file."""
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{_escaped(cue)}\n\n"
        for cue in cues(transcript.segments)
    )


def cues(segments: Iterable[Segment]) -> Iterator[Cue]:
    """Cues in order, none of them before the last has ended.

    A segment that fills more than one cue is shared out in proportion to the columns.
    """
    shown = 0
    for segment in segments:
        lines = _wrap(segment.text)
        groups = [tuple(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
        widths = [max(1, sum(map(_width, group))) for group in groups]
        start, end = (round(1000 * time) for time in (segment.start, segment.end))
        start = max(start, shown)
        end = max(end, start + LEAST * len(groups))
        spare, done = end - start - LEAST * len(groups), 0
        for index, (group, width) in enumerate(zip(groups, widths, strict=True), 1):
            done += width
            stop = start + LEAST * index + spare * done // sum(widths)
            yield Cue(max(shown, start), stop, group)
            shown = stop


def _wrap(text: str) -> list[str]:
    """Lines of at most so many columns, unless one word is wider."""
    lines: list[str] = []
    for part in _PART.findall(" ".join(text.split())):
        if lines and _width(lines[-1] + part) <= COLUMNS:
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


def _arrowless(cue: Cue) -> str:
    return "\n".join(cue.lines).replace("-->", "→")


def _escaped(cue: Cue) -> str:
    return "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
