"""Manifests: JSON lines, CSV or TSV, one row an utterance."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

from datasets import Dataset, IterableDataset

from blora_pyro.data.rows import (
    ALIASES,
    KNOWN,
    SECONDS,
    Columns,
    LocatedRecord,
    OnBadRow,
    Record,
    Row,
    RowStream,
    Unreadable,
    check_columns,
    good_rows,
    parse_located,
    parse_row,
    renamed,
    renaming,
    shown,
    stop,
    to_dataset,
)
from blora_pyro.errors import UserError, printable

NumberedRecords = Iterator[tuple[int, Record | UserError]]  # with the numbers of their lines
_ESCAPED = "surrogateescape"  # keeps bytes that are no UTF-8 as what no text may hold
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # as CSV quotes a text that holds quotes
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_manifest(
    path: str | Path,
    split: str | None = None,
    on_bad: OnBadRow = stop,
    columns: Columns | None = None,
) -> Dataset:
    """Read a manifest into memory; blank lines and further columns are dropped.

    `.jsonl` and `.json` hold a JSON object a line; `.csv` and `.tsv` begin with a header. CSV is
    quoted; TSV is not, so that what looks quoted there is refused. The columns, of which a row must
    have the first two:
        audio: `Audio(decode=False)`, {"path", "bytes"}; relative to the manifest's folder. It may
            also be called audio_filepath (see offset), file_name or path (Common Voice's, in the
            folder clips).
        text: the transcript; or sentence, or transcription.
        language: a Whisper code ("de"), or several, matrix language first ("de-en"); else "". It
            may also be called locale (Common Voice's) or lang (NeMo's).
        word_languages: a code for each token of the text, a list or with spaces between; else [].
        duration: seconds; else None.
        start, end: seconds, where the audio is a segment of a longer file; else None.
        offset: NeMo's start, whose end is `duration` later; without it 0 for an audio_filepath.
    The data set has one column more, origin: "train.csv, line 3", for messages.

    Args:
        path: of the manifest.
        split: leave out rows whose column `split` names another one, and refuse those where it is
            blank and in others not; None reads all.
        on_bad: called with the error of every bad line; where it does not raise, the line is left
            out, and there may be no rows left.
        columns: names that columns have in this manifest, by the names above.

    Raises:
        UserError: if the file cannot be read or has no rows, or `on_bad` raises.
    """
    return to_dataset(manifest_rows(path, split, on_bad, columns))


def manifest_rows(
    path: str | Path,
    split: str | None = None,
    on_bad: OnBadRow = stop,
    columns: Columns | None = None,
) -> Iterator[Row]:
    """Yield the rows of `read_manifest`."""
    records = manifest_records(path, split, columns)
    if (first := next(records, None)) is None:
        names = ", ".join(manifest_splits(path))
        lacks = f"no rows of split {split!r}, but of {names}" if names else "no rows"
        raise UserError(f"{printable(path)} has {lacks}; a row needs audio and text")
    parse = partial(parse_row, folder=os.path.dirname(path))
    yield from good_rows(chain([first], records), parse, on_bad)


def manifest_records(
    path: str | Path, split: str | None = None, columns: Columns | None = None
) -> Iterator[LocatedRecord]:
    """Yield origins, and records or why there is none; see `read_manifest`."""
    splits = [] if split is None else manifest_splits(path)
    name = printable(path)
    for line, record in _records(Path(path), columns or {}):
        if split is not None and splits and not isinstance(record, UserError):
            if not (given := _split_of(record)):
                record = UserError(f"split is blank, and in other rows it is {splits[0]}; name it")
            elif given != split:
                if given.casefold() != split.casefold():
                    continue
                record = UserError(f"split is {shown(given)}, and not {shown(split)}; write one")
        yield f"{name}, line {line}", record


def manifest_stream(
    path: str | Path, split: str | None = None, columns: Columns | None = None
) -> RowStream:
    """Return the rows of `read_manifest` as a stream of one shard."""
    arguments = {"path": str(path), "split": split, "columns": dict(columns or {})}
    records = IterableDataset.from_generator(_stream_records, gen_kwargs=arguments)
    parse = partial(_streamed_row, folder=os.path.dirname(path))
    return RowStream(records, parse, printable(path))


def _stream_records(path: str, split: str | None, columns: Columns) -> Iterator[Record]:
    for origin, record in manifest_records(path, split, columns):
        yield {"origin": origin, "record": record}


def _streamed_row(streamed: Record, folder: str) -> Row:
    return parse_located(**streamed, parse=partial(parse_row, folder=folder))


def manifest_splits(path: str | Path) -> list[str]:
    """Return the names in a manifest's column `split`, sorted; [] without one."""
    records = (record for _, record in _records(Path(path), None))
    names = {_split_of(record) for record in records if not isinstance(record, UserError)}
    return sorted(printable(name) for name in names if name)


def _split_of(record: Record) -> str:
    given = record.get("split")
    return "" if given is None else str(given).strip()


def _records(path: Path, columns: Columns | None) -> NumberedRecords:
    """Yield the records of a file, of which no more than one is in memory.

    Without `columns` only their splits are wanted: those without one may be left out.
    """
    if (suffix := path.suffix.lower()) not in FORMATS:
        raise UserError(
            f"cannot read the manifest '{printable(path)}': its name must end in "
            f"{', '.join(FORMATS)}"
        )
    reader, newline = FORMATS[suffix]
    try:
        file = open(path, encoding="utf-8-sig", errors=_ESCAPED, newline=newline)
    except (OSError, ValueError) as error:  # missing, a folder, a name that cannot be
        why = getattr(error, "strerror", None) or "there is no such file"
        raise UserError(f"cannot read the manifest '{printable(path)}': {why}") from error
    with file:
        yield from reader(file, columns)


def _check_decoded(text: str) -> None:
    """Refuse bytes that were no UTF-8, and so were escaped."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("not UTF-8 text; save the manifest as UTF-8") from error


def _json_records(lines: Iterable[str], columns: Columns | None) -> NumberedRecords:
    for number, line in enumerate(lines, start=1):
        if not line.isspace() and (columns is not None or '"split"' in line):
            yield number, _parse_json(line, columns or {})


def _parse_json(line: str, columns: Columns) -> Record | UserError:
    try:
        _check_decoded(line)
        record = json.loads(line)
        if isinstance(record, dict):
            return renamed(record, columns)
    except UserError as error:
        return error
    except (ValueError, RecursionError):
        return UserError(f"not JSON: {line.strip()[:40]!r}")
    return UserError(f"not a JSON object: {line.strip()[:40]!r}")


def _csv_records(
    lines: Iterable[str],
    columns: Columns | None,
    delimiter: str,
    quoting: Literal[0, 3],
) -> NumberedRecords:
    """Yield the rows below the header; a record is numbered by the first of its lines."""
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    known: dict[int, str] = {}
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not "".join(cells).strip():
                continue
            if header is None:
                header = _parse_header(cells, columns, delimiter)
                known = {n: name for n, name in enumerate(header) if name in {*KNOWN, "split"}}
                if columns is None and "split" not in header:
                    return
            else:
                yield line, _parse_cells(header, known, cells, quoting)
        except csv.Error as error:  # what follows cannot be told apart
            yield line, Unreadable(f"{error}; write cells with quotes or line ends as CSV does")
            return
        except UserError as error:
            yield line, error if header else Unreadable(str(error))
            if header is None:
                return


def _parse_header(cells: list[str], columns: Columns | None, delimiter: str) -> list[str]:
    """Return the names of the columns; those that give way to others have none."""
    _check_decoded("".join(cells))
    names = [cell.strip() for cell in cells]
    name, count = Counter(filter(None, names)).most_common(1)[0]
    if count > 1:
        raise UserError(f"two columns are called {shown(name)}")
    try:
        if columns is not None:
            new = renaming(names, columns)
            names = [new.get(name, name) or "" for name in names]
            check_columns(names)
    except UserError as error:
        advice = ""
        if other := next((d for d in _DELIMITERS if d != delimiter and d in "".join(cells)), ""):
            expected = _DELIMITERS[delimiter]
            advice = f"; it looks separated by {_DELIMITERS[other]}: save it with {expected}"
        elif delimiter == "\t" and '"' in "".join(cells):
            advice = "; TSV is not quoted: save it without quotes, or as .csv"
        raise UserError(f"the header {shown(' | '.join(cells))}: {error}{advice}") from error
    return names


def _parse_cells(
    header: list[str], known: dict[int, str], cells: list[str], quoting: int
) -> Record:
    _check_decoded("".join(cells))
    if len(cells) != len(header):
        raise UserError(f"{len(cells)} cells, but the header has {len(header)}")
    record = {name: cells[number] for number, name in known.items()}
    for name, cell in record.items():
        if quoting == csv.QUOTE_NONE and cell[:1] == '"' and _QUOTED.fullmatch(cell):
            raise UserError(
                f"{name} looks quoted, {shown(cell)}, and TSV is not: save it without quotes, or "
                "as .csv"
            )
        if "\n" in cell and any(suffix in cell for suffix in _suffixes(record)):
            raise UserError(f"{name} holds another row, {shown(cell)}: a quote is not closed")
    numbers = {name: _parse_number(record[name]) for name in SECONDS if name in record}
    return {**record, **numbers}


def _suffixes(record: Record) -> Iterator[str]:
    """Yield how the name of the record's file ends, ".wav"."""
    for name in ALIASES["audio"]:
        if suffix := os.path.splitext(record.get(name, ""))[1]:
            yield suffix


def _parse_number(cell: str) -> float | str | None:
    """Return a cell's number; what is none stays as it is, and is refused with the row."""
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


class _Reader(Protocol):
    def __call__(self, lines: Iterable[str], columns: Columns | None) -> NumberedRecords: ...


# What reads a file's lines, and what ends them: JSON may hold U+2028 and a carriage return as they
# are, CSV line ends inside of quotes.
FORMATS: dict[str, tuple[_Reader, str]] = {
    ".jsonl": (_json_records, "\n"),
    ".json": (_json_records, "\n"),
    ".csv": (partial(_csv_records, delimiter=",", quoting=csv.QUOTE_MINIMAL), ""),
    ".tsv": (partial(_csv_records, delimiter="\t", quoting=csv.QUOTE_NONE), ""),
}
