"""Rows of data: one parser for manifests, tables and the Hub, and errors that name their row."""

import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset, List, Value

from blora_pyro.data.audio import check_array, check_file
from blora_pyro.errors import UserError, printable

NEMO, COMMON_VOICE = "audio_filepath", "path"  # what their columns of audio are called
ALIASES = {
    "audio": ("audio", NEMO, "file_name", COMMON_VOICE),
    "text": ("text", "sentence", "transcription"),
}
TOLERANCE = 0.1  # seconds by which a stated duration may be wrong
CHUNK = 200  # rows that become Arrow at a time, whose binary columns hold 2 GB each
SECONDS = ("duration", "start", "end", "offset")
LANGUAGE = ("language", "locale", "lang")  # ours, Common Voice's and NeMo's; the first with a value
KNOWN = {*LANGUAGE, "word_languages", *SECONDS, *chain(*ALIASES.values())}
DETAILS = Features(
    {
        "text": Value("string"),
        "language": Value("string"),
        "word_languages": List(Value("string")),
        "duration": Value("float64"),
        "start": Value("float64"),
        "end": Value("float64"),
        "origin": Value("string"),
    }
)
# Not `Audio` itself: encoding a path with it needs torchcodec; casting to it does not.
FEATURES = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, **DETAILS})

Row = dict[str, Any]  # of `FEATURES`
Record = Mapping[str, Any]  # a value by column name, as a file or a table has it
LocatedRecord = tuple[str, Record | UserError]  # an origin, and a record or why there is none
Columns = Mapping[str, Sequence[str]]  # names that a column may have, first choice first


class BadRow(UserError):
    """A row that cannot be used: where it is ("train.csv, line 3"), and what is wrong with it.

    `source` is the index of its source in a mixture.
    """

    def __init__(self, origin: str, reason: str, source: int = 0) -> None:
        """Compose the message of origin and reason."""
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason, self.source = origin, reason, source


OnBadRow = Callable[[BadRow], object]  # raises the error, or returns to leave the row out


class Unreadable(UserError):
    """A row after which no other can be read; it cannot be skipped."""


def stop(error: BadRow) -> NoReturn:
    """Raise the error: the default `OnBadRow`."""
    raise error


class BadRows(list[BadRow]):
    """An `OnBadRow` that keeps the errors, notes their source, and calls another `OnBadRow`."""

    def __init__(self, on_bad: OnBadRow, source: int | None = None) -> None:
        """Start empty; None leaves the source in an error as it is."""
        super().__init__()
        self.on_bad, self.source = on_bad, source

    def __call__(self, error: BadRow) -> None:
        """Keep an error, and call the other with it."""
        if self.source is not None:
            error.source = self.source
        self.append(error)
        self.on_bad(error)


@contextmanager
def located(origin: str, source: int = 0) -> Iterator[None]:
    """Turn a `UserError` inside into a `BadRow` of this origin; `Unreadable` stays what it is."""
    try:
        yield
    except Unreadable as error:
        raise Unreadable(f"{origin}: {error}") from error.__cause__
    except UserError as error:
        raise BadRow(origin, str(error), source) from error.__cause__


def all_bad(errors: Sequence[BadRow]) -> str:
    """Return the message for data without one good row."""
    return f"all rows are bad ({len(errors):,}); the first: {errors[0]}"


@dataclass(frozen=True)
class RowStream:
    """Rows that are read when they are needed."""

    records: IterableDataset  # raw, in shards
    parse: Callable[[Record], Row]  # leaves the audio undecoded; raises `BadRow`
    name: str  # in messages


def check_columns(names: Iterable[str]) -> dict[str, str]:
    """Return by which name "audio" and "text" go; refuse none, or two for one of them."""
    names = set(names)
    found = {wanted: [name for name in ALIASES[wanted] if name in names] for wanted in ALIASES}
    if len(found["audio"]) > 1 and COMMON_VOICE in found["audio"]:  # a path beside the audio
        found["audio"].remove(COMMON_VOICE)
    if missing := [wanted for wanted in ALIASES if not found[wanted]]:
        needs = " and ".join(f"{first} (or {', '.join(rest)})" for first, *rest in ALIASES.values())
        raise UserError(
            f"no {' and no '.join(missing)}; a row needs {needs}, or --column {missing[0]}=NAME"
        )
    for wanted, given in found.items():
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} both say what the {wanted} is; keep one, or choose: "
                f"--column {wanted}={given[0]}"
            )
    return {wanted: given[0] for wanted, given in found.items()}


def renaming(names: Iterable[str], columns: Columns) -> dict[str, str | None]:
    """Return the known name of every column that `columns` chooses, by its own.

    None is for those that say the same, and give way.

    Raises:
        UserError: if there is no such column.
    """
    names, found = list(names), dict[str, str | None]()
    for wanted, choices in columns.items():
        if (chosen := next((name for name in choices if name in names), None)) is None:
            there = printable(", ".join(names[:20]), 200) or "none"
            raise UserError(
                f"no column {' or '.join(choices)} for {wanted}; its columns are: {there}"
            )
        same = {**ALIASES, "language": LANGUAGE}.get(wanted, (wanted,))
        found |= {name: None for name in same if name in names}
        found[chosen] = wanted
    return found


def renamed(record: Record, columns: Columns) -> Record:
    """Return a record with its columns called as `columns` says; see `renaming`."""
    if not columns:
        return record
    new = renaming(record, columns)
    return {new.get(name, name) or "": one for name, one in record.items()}


def parse_row(record: Record, folder: str | None = None) -> Row:
    """Return a record as a row of `FEATURES`, all but its origin; further columns are dropped.

    `folder` is that of a manifest, None for a table; see `parse_audio`.
    """
    audio, text = _named(record, "audio"), _named(record, "text")
    if audio is None or text is None:
        audio, text = check_columns(record).values()
    clips = folder is not None and audio == COMMON_VOICE
    parsed = parse_audio(record[audio], folder, clips)
    return {"audio": parsed, **parse_details(record, text, audio)}


def _named(record: Record, wanted: str) -> str | None:
    """Return the one column that says it, nulls aside; None if there is none, or not one."""
    found = [name for name in ALIASES[wanted] if record.get(name) is not None]
    if len(found) == 2 and found[1] == COMMON_VOICE:
        del found[1]
    return found[0] if len(found) == 1 else None


def parse_details(record: Record, text: str, audio: str) -> Row:
    """Return what `parse_row` does without the audio; `text`, `audio` name these columns."""
    codes = record.get("word_languages")
    if isinstance(codes, str):
        codes = codes.split()
    if codes is not None and not isinstance(codes, list | tuple):
        raise UserError(f"word_languages must be a list of texts, got {shown(codes)}")
    language = record.get("language")
    if language in (None, ""):  # others' may also be numbers, which say nothing here
        texts = (one for name in LANGUAGE if isinstance(one := record.get(name), str) and one)
        language = next(texts, "")
    duration, start, end, offset = (_seconds(name, record.get(name)) for name in SECONDS)
    segmented = start is not None or end is not None
    if offset is not None and segmented:
        raise UserError("offset, and start or end, both say what the segment is; keep one")
    if not segmented and (offset is not None or audio == NEMO):  # duration is the segment's there
        start = offset
        end = None if duration is None else (offset or 0.0) + duration
    elif duration is not None and start is not None and end is None:
        end = start + duration  # of a duration of the whole file there is no such segment
    elif duration is not None and start is None and end is not None:
        if abs(end - duration) > TOLERANCE:
            raise UserError(
                f"end is {end:g} s and duration {duration:g} s, and start is missing; give it"
            )
    if end is not None and end <= (start or 0.0):
        raise UserError(f"the segment starts at {start or 0.0:g} s, but ends at {end:g} s")
    return {
        "text": _text("text", record[text]),
        "language": _text("language", language),
        "word_languages": [_text("word_languages", code) for code in codes or []],
        "duration": duration,
        "start": start,
        "end": end,
    }


def parse_audio(value: object, folder: str | None = None, clips: bool = False) -> dict[str, Any]:
    """Return audio as {"path", "bytes"}, not decoded; arrays become wav, 32-bit floats.

    With a folder, the value is the path of a file that exists, relative to it, or with `clips` to
    its folder of that name, which comes first; without one a path, encoded bytes,
    {"path", "bytes"}, or {"array", "sampling_rate"}.
    """
    if folder is not None:
        given = _text("audio", value)
        if not given.strip():
            raise UserError("audio is empty; give a path")
        path = os.path.join(folder, given)
        if clips and os.path.isfile(inside := os.path.join(folder, "clips", given)):
            path = inside
        check_file(path)
        return {"bytes": None, "path": path}
    if isinstance(value, str | Path):
        value = {"path": value}
    elif isinstance(value, bytes | bytearray):
        value = {"bytes": value}
    if isinstance(value, Mapping):
        source, content = value.get("path"), value.get("bytes")
        name = _text("audio", str(source)) if isinstance(source, str | Path) else None
        if not isinstance(content, bytes | bytearray) and value.get("array") is not None:
            wave, rate = check_array(value)
            file = io.BytesIO()
            soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
            content = file.getvalue()
        if isinstance(content, bytes | bytearray):
            return {"bytes": bytes(content), "path": name}
        if name:
            return {"bytes": None, "path": name}
    raise UserError(f"audio must be a path, bytes, or an array with its rate, got {shown(value)}")


def parse_located(
    origin: str, record: Record | UserError, parse: Callable[[Record], Row] = parse_row
) -> Row:
    """Return a record as a row with its origin, or raise `BadRow` or `Unreadable`.

    An error stands for a record that could not be read.
    """
    with located(origin):
        if isinstance(record, UserError):
            raise record
        return {**parse(record), "origin": origin}


def good_rows(
    records: Iterable[LocatedRecord],
    parse: Callable[[Record], Row] = parse_row,
    on_bad: OnBadRow = stop,
) -> Iterator[Row]:
    """Yield the good rows of origins and records; `on_bad` is called with the other errors."""
    for origin, record in records:
        try:
            row = parse_located(origin, record, parse)
        except BadRow as error:
            on_bad(error)
        else:
            yield row


def to_dataset(rows: Iterable[Row], features: Features = FEATURES) -> Dataset:
    """Return rows as a data set in memory, its audio not decoded."""
    schema, rows = features.arrow_schema, iter(rows)
    batches = []
    while some := list(islice(rows, CHUNK)):
        batches.append(pyarrow.RecordBatch.from_pylist(some, schema=schema))
    # Its own fingerprint would be made of a pickled copy of it all.
    table = pyarrow.Table.from_batches(batches, schema)
    dataset = Dataset(table, fingerprint=secrets.token_hex(8))
    return dataset.cast_column("audio", Audio(decode=False)) if "audio" in features else dataset


def shown(value: object) -> str:
    """Return the beginning of a value as JSON, or as Python where it is none."""
    try:
        return json.dumps(value, default=repr)[:40]
    except (TypeError, ValueError, RecursionError):  # keys that are no text, values that loop
        return printable(repr(value))[:40]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        raise UserError(f"{name} is not valid Unicode: {shown(value)}") from error
    return value


def _seconds(name: str, value: object) -> float | None:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if 0 <= value < 1e9:
            return float(value)
    raise UserError(f"{name} must be a number of seconds, got {shown(value)}")
