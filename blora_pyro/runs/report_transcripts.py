"""Utterances in a run's report: what base and adapted model make of them, marked, and to listen to.

What is shown is chosen by what adaptation changed. Audio is embedded where all of it is small, else
linked where it is a file.
"""

import base64
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from blora_pyro.data import is_hub_id, load_split, read_audio
from blora_pyro.errors import UserError, printable
from blora_pyro.languages import is_unspaced
from blora_pyro.models import Base
from blora_pyro.options import FitConfig, column_names
from blora_pyro.posterior import Posterior
from blora_pyro.runs.report import ShownStep, shown_steps
from blora_pyro.runs.scoring import set_sources
from blora_pyro.runs.utterances import paired
from blora_pyro.sources import describe_source
from blora_pyro.transcription import Transcriber
from blora_pyro.transcription.windows import Recording

SHOWN = 200  # utterances
STEPS = 400  # of an alignment
EMBEDDED = 2_000_000  # bytes of audio
GAP = "␣"  # a space that is an error
AUDIO_TYPES = {  # what a browser plays, by how it begins
    b"RIFF": "audio/wav",
    b"OggS": "audio/ogg",
    b"fLaC": "audio/flac",
    b"ID3": "audio/mpeg",
    b"\xff\xfb": "audio/mpeg",
    b"\xff\xf3": "audio/mpeg",
    b"\x1aE\xdf\xa3": "audio/webm",
}

Row = Mapping[str, Any]  # of `utterance_rows`


class Word(NamedTuple):
    """A word of a line.

    Attributes:
        text: Of one word, or of characters that are alike.
        mark: An error, `S`, `D` or `I`; of the reference `fixed`, `broken` or `missed`; "" is none.
        about: What was said, or how sure the model is; "" is nothing to tell.
        spaced: Whether a space is before it.
        is_point: Whether it counts in PIER.
        confidence: Of `Transcriber`; None without draws.
    """

    text: str
    mark: str = ""
    about: str = ""
    spaced: bool = True
    is_point: bool = False
    confidence: float | None = None


@dataclass(frozen=True)
class Line:
    """A transcript: whose it is, its words, and how many of the reference's are wrong."""

    label: str
    words: Sequence[Word]
    edits: int | None = None


@dataclass
class Utterance:
    """An utterance in the report.

    Attributes:
        row: Of one of the runs, adapted.
        order: Its place among all.
        reference: Its words, with what became of them if there is one run.
        bases: Transcripts of the base, more than one if the runs have several.
        adapted: Transcripts of the runs, and of their draws.
        changes: Of each run, see `paired`.
        wrong: The most words that a run has wrong.
        audio: {"path", "bytes"}, where it could be found.
        source: Of an audio element, embedded or a link.
    """

    row: Row
    order: int
    reference: Sequence[Word]
    bases: list[Line] = field(default_factory=list)
    adapted: list[Line] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    wrong: int = 0
    audio: Mapping[str, Any] | None = None
    source: str | None = None

    @property
    def place(self) -> str:
        """Where its row is, without the folder: "test.jsonl, line 3"."""
        return printable(PureWindowsPath(self.row["origin"]).name)

    @property
    def harm(self) -> int:
        """Words that adaptation broke, in the run that broke the most; below 0 if it fixed some."""
        return max(self.changes)

    @property
    def help(self) -> int:
        """The same of the run that fixed the most."""
        return min(self.changes)


def most_changed(
    runs: Mapping[str, Sequence[dict[str, Any]]], limit: int = SHOWN
) -> tuple[list[Utterance], int]:
    """Return the utterances that runs changed the most, the most harmed first, and of how many.

    One half is what was harmed, the other what was helped, as far as there is so much; then come
    those that are as wrong as before.

    Args:
        runs: Rows by the label of their run.
        limit: Number of utterances.
    """
    kept: dict[tuple[Any, ...], list[tuple[str, Row, Row, int]]] = defaultdict(list)
    for label, rows in runs.items():
        if not {"base", "adapted"} <= {row["state"] for row in rows}:
            continue
        for before, after, change in paired(rows):
            key = after["set"], str(after.get("set_fingerprint")), after.get("utterance", 0)
            kept[key].append((label, before, after, change))
    changes = {key: [one[3] for one in some] for key, some in kept.items()}
    wrong = {key: max(one[2]["edits"] for one in some) for key, some in kept.items()}
    harmed = sorted((k for k in kept if max(changes[k]) > 0), key=lambda k: -max(changes[k]))
    helped = sorted((k for k in kept if min(changes[k]) < 0), key=lambda k: min(changes[k]))
    rest = sorted((k for k in kept if not any(changes[k])), key=lambda k: -wrong[k])
    helped = [key for key in helped if max(changes[key]) <= 0]
    chosen = harmed[: max(limit // 2, limit - len(helped))]
    chosen += helped[: limit - len(chosen)]
    chosen += rest[: limit - len(chosen)]
    chosen.sort(key=lambda key: (-max(changes[key]), -wrong[key]))
    orders = {key: order for order, key in enumerate(kept)}
    return [_utterance(kept[key], orders[key]) for key in chosen], len(kept)


def _utterance(found: Sequence[tuple[str, Row, Row, int]], order: int) -> Utterance:
    _, before, after, _ = found[0]
    alone = len(found) == 1
    utterance = Utterance(after, order, _reference(before if alone else after, after))
    for label, base, row, change in found:
        words = _hypothesis(base)
        if not any(line.words == words for line in utterance.bases):
            name = f"base of {label}" if utterance.bases else "base"
            utterance.bases.append(Line(name, words, base["edits"]))
        utterance.adapted.append(Line(label or "adapted", _hypothesis(row), row["edits"]))
        utterance.changes.append(change)
        utterance.wrong = max(utterance.wrong, row["edits"])
    return utterance


def _hypothesis(row: Row) -> list[Word]:
    """Return what a model made of an utterance; words that it left out are there, too."""
    about = {"": "", "S": "said: {}", "D": "left out", "I": "not said"}
    words = [
        Word(
            one.reference if one.mark == "D" else one.hypothesis,
            one.mark,
            about[one.mark].format(one.reference),
        )
        for one in _steps(row)
    ]
    return _spaced(row["metric"], words)


def _reference(before: Row, after: Row) -> list[Word]:
    """Return what was said, and which of its words only one of the two has right, or neither."""
    both = ([one for one in _steps(row) if one.mark != "I"] for row in (before, after))
    marks = {(False, True): "broken", (True, False): "fixed", (True, True): "missed"}
    words = [
        Word(new.reference, marks.get((old.mark != "", new.mark != ""), ""), is_point=new.is_point)
        for old, new in zip(*both, strict=False)
    ]
    return _spaced(after["metric"], words)


def _steps(row: Row) -> list[ShownStep]:
    steps = shown_steps(row)
    if len(steps) > STEPS:
        steps[STEPS:] = [ShownStep("", "…", "…", False)]
    return steps


def _spaced(measure: str, words: Sequence[Word]) -> list[Word]:
    """Return words with spaces between them, and characters put together where they are alike."""
    found: list[Word] = []
    for word in words:
        before = found[-1] if found else None
        if word.text.isspace() and word.mark:
            word = word._replace(text=GAP)
        sides = (before.text[-1:], word.text[:1]) if before else ("", "")
        spaced = before is not None and measure != "cer" and not all(map(is_unspaced, sides))
        kind = (word.mark, word.is_point)
        if before and measure == "cer" and kind == (before.mark, before.is_point):
            about = word.about and before.about + word.about.removeprefix("said: ")
            about = before.about if word.about == before.about else about
            found[-1] = before._replace(text=before.text + word.text, about=about)
        else:
            found.append(word._replace(spaced=spaced))
    return found


# ---- to listen to


def find_audio(
    utterances: Sequence[Utterance], config: FitConfig, split: str, from_hub: bool = False
) -> None:
    """Give utterances their audio: files, or what Parquet files and the like hold.

    Args:
        utterances: They stay without where there is none any more.
        config: Names their sets.
        split: Of the sets.
        from_hub: Load sets of the Hub, too.
    """
    for one in utterances:
        path = one.row.get("audio")
        with suppress(OSError, ValueError):
            if path and Path(path).is_file():
                one.audio = {"path": path, "bytes": None}
    if not (silent := [one for one in utterances if one.audio is None]):
        return
    names = [*config.sources, config.test, config.dev, *config.backward_sets.values()]
    if not from_hub and any(is_hub_id(describe_source(name)) for name in names if name is not None):
        return
    with suppress(UserError):  # of data that are gone
        sources = set_sources(config, split)
        for name in {one.row["set"] for one in silent} & sources.keys():
            its = sources[name]
            columns = column_names(config.column)
            data = load_split(its.source, its.split, lambda error: None, columns)
            places = {origin: place for place, origin in enumerate(data["origin"])}
            for one in silent:
                place = places.get(one.row["origin"])
                if one.row["set"] == name and place is not None:
                    one.audio = data[place]["audio"]


def embed_audio(utterances: Sequence[Utterance]) -> int:
    """Give utterances their sources, and return how many are links.

    If all the audio is `EMBEDDED` bytes at most, it is in them. Otherwise files are links, and what
    is in no file is embedded, from the first utterance on, up to that size.
    """
    sizes = [_size(one.audio) for one in utterances]
    fits, used, links = sum(sizes) <= EMBEDDED, 0, 0
    for one, size in zip(utterances, sizes, strict=True):
        if not size or one.audio is None:
            continue
        is_link = not fits and one.audio.get("bytes") is None
        if not is_link and used + size > EMBEDDED:
            continue
        used += 0 if is_link else size
        with suppress(OSError, ValueError):
            if source := _source(one.audio, is_link):
                times = [one.row.get(name) for name in ("start", "end")]
                part = ",".join("" if time is None else f"{time:g}" for time in times)
                one.source = source + (f"#t={part.rstrip(',')}" if part != "," else "")
                links += is_link
    return links


def _size(audio: Mapping[str, Any] | None) -> int:
    if audio is None:
        return 0
    if audio.get("bytes") is not None:
        return len(audio["bytes"])
    with suppress(OSError):
        return Path(audio["path"]).stat().st_size
    return 0


def _source(audio: Mapping[str, Any], is_link: bool) -> str | None:
    """Return the address of audio, "" or None if it is none that a browser plays."""
    content, path = audio.get("bytes"), Path(audio.get("path") or "").resolve()
    if content is None:
        with path.open("rb") as file:
            content = file.read(16 if is_link else EMBEDDED)
    kinds = (kind for start, kind in AUDIO_TYPES.items() if content.startswith(start))
    kind = next(kinds, "audio/mp4" if content[4:8] == b"ftyp" else None)
    if kind is None:  # whatever a damaged file names as audio is not shown
        return None
    return path.as_uri() if is_link else f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- how sure


def add_confidences(
    utterances: Sequence[Utterance],
    base: Base,
    posterior: Posterior,
    samples: int,
    label: str,
    on_done: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Give utterances with audio a line more: the words as written, and how sure of each.

    Args:
        utterances: With their audio.
        base: Of the run.
        posterior: Of the run.
        samples: Posterior draws, see `Transcriber`.
        label: Of the run; "" if there is one.
        on_done: Called with how many utterances are done, and of how many.

    Raises:
        UserError: If there is nothing to draw from, or audio can't be read.
    """
    by_language: dict[str, list[Utterance]] = defaultdict(list)
    for one in utterances:
        if one.audio is not None:
            by_language[str(one.row.get("language") or "")].append(one)
    done, total = 0, sum(map(len, by_language.values()))
    for language, some in by_language.items():
        transcriber = Transcriber(base, posterior, language or None, samples=samples)
        for first in range(0, len(some), transcriber.batch_size):
            chosen = some[first : first + transcriber.batch_size]
            transcripts = transcriber.transcribe([_recording(one) for one in chosen])
            for one, transcript in zip(chosen, transcripts, strict=True):
                found = [word for part in transcript.segments for word in part.words or ()]
                words = [
                    Word(
                        printable(word.text),
                        about=f"{word.confidence:.0%} sure",
                        confidence=word.confidence,
                    )
                    for word in found
                ]
                one.adapted.append(Line(f"{label} how sure".strip(), _spaced("mer", words)))
            done += len(chosen)
            on_done(done, total)


def _recording(one: Utterance) -> Recording:
    assert one.audio is not None
    name = printable(one.row.get("audio") or one.row["origin"])
    return Recording(
        name, read_audio(one.audio, start=one.row.get("start"), end=one.row.get("end"))
    )
