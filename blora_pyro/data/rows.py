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


class BadRow(UserError):
    """A row that cannot be used.

    Attributes:
        origin: where it is, such as "train.csv, line 3".
        reason: what is wrong with it.
        source: the index of its source in a mixture.
    """

    def __init__(self, origin: str, reason: str, source: int = 0) -> None:
        """See the attributes."""
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason, self.source = origin, reason, source


OnBadRow = Callable[[BadRow], object]  # raises the error, or returns to leave the row out


class Unreadable(UserError):
    """A row after which no other can be read; it cannot be skipped."""


def stop(error: BadRow) -> NoReturn:
    """Raise the error: the default `OnBadRow`."""
    raise error


class BadRows(list[BadRow]):
    """An `OnBadRow` that keeps the errors of one source and calls another `OnBadRow` with them."""

    def __init__(self, on_bad: OnBadRow, source: int | None = None) -> None:
        """Start empty; a source is noted in every error."""
        super().__init__()
        self.on_bad, self.source = on_bad, source

    def __call__(self, error: BadRow) -> None:
        """Keep an error, and call the other with it."""
        if self.source is not None:
            error.source = self.source
        self.append(error)
        self.on_bad(error)


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Put "origin: " before the message of a `UserError` that is raised inside.

    Args:
        origin: where a row is, such as "train.csv, line 3".

    Raises:
        BadRow: the error from inside, located; `Unreadable` stays what it is.
    """
    try:
        yield
    except Unreadable as error:
        raise Unreadable(f"{origin}: {error}") from error.__cause__
    except UserError as error:
        raise BadRow(origin, str(error)) from error.__cause__


def all_bad(errors: Sequence[BadRow]) -> str:
    """Return the message for data without one good row."""
    return f"all rows are bad ({len(errors):,}); the first: {errors[0]}"


@dataclass(frozen=True)
class RowStream:
    """Rows that are read when they are needed.

    Attributes:
        records: raw records, in shards.
        parse: returns a record as a row, its audio not decoded, or raises a `BadRow`.
        name: of the data in messages.
    """

    records: IterableDataset
    parse: Callable[[Record], Row]
    name: str


def check_columns(names: Iterable[str]) -> None:
    """Refuse the columns of a header, a table or an object that make no row.

    Raises:
        UserError: if audio or text is missing, or there twice under different names.
    """
    names = set(names)
    found = {wanted: [name for name in ALIASES[wanted] if name in names] for wanted in ALIASES}
    if missing := [wanted for wanted in ALIASES if not found[wanted]]:
        needs = " and ".join(f"{first} (or {', '.join(rest)})" for first, *rest in ALIASES.values())
        raise UserError(f"no {' and no '.join(missing)}; a row needs {needs}")
    for wanted, given in found.items():
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both say what the {wanted} is; keep one")


def column(names: Iterable[str], wanted: str) -> str:
    """Return the name under which checked columns have "audio" or "text"."""
    names = set(names)
    return next(name for name in ALIASES[wanted] if name in names)


def parse_row(record: Record, folder: Path | None = None) -> Row:
    """Return a record as a row of `FEATURES`, all but its origin; further columns are dropped.

    Args:
        record: of a manifest or a table.
        folder: of the manifest; None for a table. See `parse_audio`.

    Raises:
        UserError: if the record is no such row, or a manifest's audio file does not exist.
    """
    given = {name for names in ALIASES.values() for name in names if record.get(name) is not None}
    for names in ALIASES.values():  # a null is no value where another name has one
        if given.intersection(names):
            record = {
                name: one for name, one in record.items() if name in given or name not in names
            }
    check_columns(record)
    audio = parse_audio(record[column(record, "audio")], folder)
    return {"audio": audio, **parse_details(record)}


def parse_details(record: Record) -> Row:
    """Return a record as a row of `DETAILS`, all but its origin: `parse_row` without the audio.

    Raises:
        UserError: if a value is not what its column holds.
    """
    codes = record.get("word_languages")
    if isinstance(codes, str):
        codes = codes.split()
    if codes is not None and not isinstance(codes, list | tuple):
        raise UserError(f"word_languages must be a list of texts, got {shown(codes)}")
    language = record.get("language")
    row: Row = {
        "text": _text("text", record[column(record, "text")]),
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

    Args:
        value: with a folder, the path of a file that exists, relative to it; without one a path,
            encoded bytes, {"path", "bytes"}, or {"array", "sampling_rate"}.
        folder: of the manifest.

    Raises:
        UserError: if the value is none of these.
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


def parse_rows(
    records: Iterable[tuple[str, Record | UserError]], parse: Callable[[Record], Row]
) -> Iterator[Row | BadRow]:
    """Yield each record as a row, or the error, with its origin, if it is none.

    Args:
        records: origins and records; an error stands for a record that could not be read.
        parse: returns a record as a row, or raises a `UserError`.

    Raises:
        Unreadable: if a record is one.
    """
    for origin, record in records:
        try:
            with located(origin):
                if isinstance(record, UserError):
                    raise record
                row = {**parse(record), "origin": origin}
        except BadRow as error:
            yield error
        else:
            yield row


def good_rows(rows: Iterable[Row | BadRow], on_bad: OnBadRow = stop) -> Iterator[Row]:
    """Yield the good rows; `on_bad` is called with the errors of the others."""
    for row in rows:
        if isinstance(row, BadRow):
            on_bad(row)
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
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e9:  # type: ignore[operator]
        raise UserError(f"{name} must be a number of seconds, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]
