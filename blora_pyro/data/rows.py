"""Rows of data: one parser for manifests, tables and the Hub, and errors that name their row."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset, List, Value

from blora_pyro.data.audio import check_array
from blora_pyro.errors import UserError, printable

ALIASES = {
    "audio": ("audio", "audio_filepath", "file_name"),
    "text": ("text", "sentence", "transcription"),
}
OPTIONAL = ("language", "word_languages", "duration", "start", "end")
KNOWN = {*OPTIONAL, *(name for names in ALIASES.values() for name in names)}
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
    if missing := [wanted for wanted in ALIASES if not found[wanted]]:
        needs = " and ".join(f"{first} (or {', '.join(rest)})" for first, *rest in ALIASES.values())
        raise UserError(f"no {' and no '.join(missing)}; a row needs {needs}")
    for wanted, given in found.items():
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both say what the {wanted} is; keep one")
    return {wanted: given[0] for wanted, given in found.items()}


def parse_row(record: Record, folder: Path | None = None) -> Row:
    """Return a record as a row of `FEATURES`, all but its origin; further columns are dropped.

    `folder` is that of a manifest, None for a table; see `parse_audio`.
    """
    for names in ALIASES.values():  # a null is no value where another name has one
        given = {name for name in names if record.get(name) is not None}
        nulls = set(names) - given if given else set()
        record = {name: one for name, one in record.items() if name not in nulls}
    audio, text = check_columns(record).values()
    return {"audio": parse_audio(record[audio], folder), **parse_details(record, text)}


def parse_details(record: Record, text: str) -> Row:
    """Return what `parse_row` does without the audio; `text` is the name of that column."""
    codes = record.get("word_languages")
    if isinstance(codes, str):
        codes = codes.split()
    if codes is not None and not isinstance(codes, list | tuple):
        raise UserError(f"word_languages must be a list of texts, got {shown(codes)}")
    language = record.get("language")
    row: Row = {
        "text": _text("text", record[text]),
        "language": "" if language is None else _text("language", language),
        "word_languages": [_text("word_languages", code) for code in codes or []],
        **{name: _seconds(name, record.get(name)) for name in ("duration", "start", "end")},
    }
    start, end = row["start"] or 0.0, row["end"]
    if end is not None and end <= start:
        raise UserError(f"the segment starts at {start:g} s, but ends at {end:g} s")
    return row


def parse_audio(value: object, folder: Path | None = None) -> dict[str, Any]:
    """Return audio as {"path", "bytes"}, not decoded; arrays become wav, 32-bit floats.

    With a folder, the value is the path of a file that exists, relative to it; without one a path,
    encoded bytes, {"path", "bytes"}, or {"array", "sampling_rate"}.
    """
    if folder is not None:
        path = _text("audio", value)
        if not path.strip():
            raise UserError("audio is empty; give a path")
        if not os.path.isfile(folder / path):
            raise UserError(f"the audio file '{printable(folder / path)}' does not exist")
        return {"bytes": None, "path": str(folder / path)}
    if isinstance(value, str | Path):
        value = {"path": value}
    elif isinstance(value, bytes | bytearray):
        value = {"bytes": value}
    if isinstance(value, Mapping):
        given, content = value.get("path"), value.get("bytes")
        name = _text("audio", str(given)) if isinstance(given, str | Path) else None
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


def to_dataset(rows: list[Row], features: Features = FEATURES) -> Dataset:
    """Return rows as a data set in memory, its audio not decoded."""
    columns = {name: [row[name] for row in rows] for name in features}
    dataset = Dataset.from_dict(columns, features=features)
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
