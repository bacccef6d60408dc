"""Rows: what a row of any source may say, and the one form in which the rest gets it."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from datasets import Audio, Dataset, Features, IterableDataset, List, Value

from blora_pyro.errors import UserError, printable

ALIASES = {
    "audio": ("audio", "audio_filepath", "file_name"),
    "text": ("text", "sentence", "transcription"),
}
OPTIONAL = ("language", "word_languages", "duration", "start", "end")
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

Row = dict[str, Any]
Record = Mapping[str, Any]


class BadRow(UserError):
    """A row that cannot be used.

    Attributes:
        origin: where it stands, such as "train.csv, line 3".
        reason: what is wrong with it.
        source: the place of its source among those of a mixture.
    """

    def __init__(self, origin: str, reason: str, source: int = 0) -> None:
        """See the attributes."""
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason, self.source = origin, reason, source


OnBadRow = Callable[[BadRow], object]  # what is to be done: raise it, or keep it and go on


class Unreadable(UserError):
    """A row after which no other can be read: no row to be skipped."""


def stop(error: BadRow) -> NoReturn:
    """Raise it: the `OnBadRow` that is meant where nothing else is said."""
    raise error


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Put "origin: " before the message of a `UserError` that is raised inside.

    Args:
        origin: where a row stands, such as "train.csv, line 3".

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
    """Say that no row is left."""
    return f"all rows are bad ({len(errors):,}); the first: {errors[0]}"


@dataclass(frozen=True)
class RowStream:
    """Rows that are read when they are needed.

    Attributes:
        records: raw ones, in shards.
        parse: makes a row of `FEATURES` of a record, its audio not decoded, or raises a `BadRow`.
        name: what messages call it.
    """

    records: IterableDataset
    parse: Callable[[Record], Row]
    name: str


def check_columns(names: Iterable[str]) -> None:
    """Refuse columns, those of a header or of one object, that make no row.

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


def parse_row(record: Record, folder: Path) -> Row:
    """Return a record as a row of `FEATURES`, all but its origin.

    Args:
        record: a value by column name; further columns are dropped.
        folder: what paths of audio are relative to.

    Raises:
        UserError: if the record is no such row, or its audio file does not exist.
    """
    record = _without_spare_nulls(record)
    check_columns(record)
    sound = parse_audio(record[column(record, "audio")], folder)
    return {"audio": sound, **parse_details(record)}


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
        "text": check_text("text", record[column(record, "text")]),
        "language": "" if language is None else check_text("language", language),
        "word_languages": [check_text("word_languages", code) for code in codes or []],
        **{name: _seconds(name, record.get(name)) for name in ("duration", "start", "end")},
    }
    start, end = row["start"] or 0.0, row["end"]
    if end is not None and end <= start:
        raise UserError(f"the segment starts at {start:g} s, but ends at {end:g} s")
    return row


def parse_audio(value: object, folder: Path) -> dict[str, Any]:
    """Return {"path", "bytes"} of a manifest's audio, a path relative to `folder`.

    Raises:
        UserError: if it is no such path, or there is no such file.
    """
    path = check_text("audio", value)
    if not path.strip():
        raise UserError("audio is empty; give a path")
    if not os.path.isfile(folder / path):
        raise UserError(f"the audio file '{printable(folder / path)}' does not exist")
    return {"bytes": None, "path": str(folder / path)}


def parse_rows(
    records: Iterable[tuple[str, Record | UserError]], parse: Callable[[Record], Row]
) -> Iterator[Row | BadRow]:
    """Yield each record as a row, or as the located error that tells why it is none.

    Args:
        records: origins and records; an error stands for a record that could not be read.
        parse: makes a row of a record, or raises a `UserError`.

    Raises:
        Unreadable: if a record is that.
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
    """Yield the rows that are good; `on_bad` is told of the others, and raises or not."""
    for row in rows:
        if isinstance(row, BadRow):
            on_bad(row)
        else:
            yield row


def to_dataset(rows: list[Row], features: Features = FEATURES) -> Dataset:
    """Return rows, if any, as a data set in memory, its audio not decoded."""
    columns = {name: [row[name] for row in rows] for name in features}
    dataset = Dataset.from_dict(columns, features=features)
    return dataset.cast_column("audio", Audio(decode=False)) if "audio" in features else dataset


def shown(value: object) -> str:
    """Return the beginning of a value as JSON, or as Python where it is none."""
    try:
        return json.dumps(value, default=repr)[:40]
    except (TypeError, ValueError, RecursionError):  # keys that are no text, values that loop
        return printable(repr(value))[:40]


def check_text(name: str, value: object) -> str:
    """Return a value that must be text.

    Raises:
        UserError: naming the column, if it is none, or no valid Unicode.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        raise UserError(f"{name} is not valid Unicode: {shown(value)}") from error
    return value


def _without_spare_nulls(record: Record) -> Record:
    """Drop null aliases where another alias has the value."""
    spare = {
        name
        for names in ALIASES.values()
        if any(record.get(name) is not None for name in names)
        for name in names
        if record.get(name) is None
    }
    return {name: value for name, value in record.items() if name not in spare}


def _seconds(name: str, value: object) -> float | None:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e9:  # type: ignore[operator]
        raise UserError(f"{name} must be a number of seconds, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]
