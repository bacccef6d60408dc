"""Manifests: JSON lines, CSV or TSV, one row an utterance."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from datasets import Dataset, IterableDataset

from blora_pyro.data.rows import (
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
    shown,
    stop,
    to_dataset,
)
from blora_pyro.errors import UserError, printable

NumberedRecords = Iterator[tuple[int, Record | UserError]]  # with the numbers of their lines
_ESCAPED = "surrogateescape"  # keeps bytes that are no UTF-8 as what no text may hold


def read_manifest(path: str | Path, split: str | None = None, on_bad: OnBadRow = stop) -> Dataset:
    """Read a manifest into memory; blank lines and further columns are dropped.

    `.jsonl` and `.json` hold a JSON object a line; `.csv` and `.tsv` begin with a header, and are
    quoted as CSV is. The columns, of which a row must have the first two:
        audio: `Audio(decode=False)`, {"path", "bytes"}; relative to the manifest's folder. It may
            also be called audio_filepath or file_name.
        text: the transcript; or sentence, or transcription.
        language: a Whisper code ("de"), or several, matrix language first ("de-en"); else "".
        word_languages: a code for each token of the text, a list or with spaces between; else [].
        duration: seconds; else None.
        start, end: seconds, where the audio is a segment of a longer file; else None.
    The data set has one column more, origin: "train.csv, line 3", for messages.

    Args:
        path: of the manifest.
        split: leave out rows whose column `split` names another one; None reads all.
        on_bad: called with the error of every bad line; where it does not raise, the line is left
            out, and there may be no rows left.

    Raises:
        UserError: if the file cannot be read or has no rows, or `on_bad` raises.
    """
    records = manifest_records(path, split)
    if (first := next(records, None)) is None:
        names = ", ".join(manifest_splits(path))
        lacks = f"no rows of split {split!r}, but of {names}" if names else "no rows"
        raise UserError(f"{printable(path)} has {lacks}; a row needs audio and text")
    parse = partial(parse_row, folder=Path(path).parent)
    return to_dataset(list(good_rows(chain([first], records), parse, on_bad)))


def manifest_records(path: str | Path, split: str | None = None) -> Iterator[LocatedRecord]:
    """Yield origins, and records or why there is none; see `read_manifest`."""
    for line, record in _records(Path(path)):
        known = (None, "", split)
        if split is None or isinstance(record, UserError) or record.get("split") in known:
            yield f"{printable(path)}, line {line}", record


def manifest_stream(path: str | Path, split: str | None = None) -> RowStream:
    """Return the rows of `read_manifest` as a stream of one shard."""
    arguments = {"path": str(path), "split": split}
    records = IterableDataset.from_generator(_stream_records, gen_kwargs=arguments)
    return RowStream(records, partial(_streamed_row, folder=Path(path).parent), printable(path))


def _stream_records(path: str, split: str | None) -> Iterator[Record]:
    for origin, record in manifest_records(path, split):
        yield {"origin": origin, "record": record}


def _streamed_row(streamed: Record, folder: Path) -> Row:
    return parse_located(**streamed, parse=partial(parse_row, folder=folder))


def manifest_splits(path: str | Path) -> list[str]:
    """Return the names in a manifest's column `split`, sorted; [] without one."""
    records = (record for _, record in _records(Path(path)) if not isinstance(record, UserError))
    names = {record.get("split") for record in records if isinstance(record.get("split"), str)}
    return sorted(printable(name) for name in names if name)


def _records(path: Path) -> NumberedRecords:
    """Yield the records of a file, of which no more than one is in memory."""
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
        yield from reader(file)


def _check_decoded(text: str) -> None:
    """Refuse bytes that were no UTF-8, and so were escaped."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("not UTF-8 text; save the manifest as UTF-8") from error


def _json_records(lines: Iterable[str]) -> NumberedRecords:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parse_json(line)


def _parse_json(line: str) -> Record | UserError:
    try:
        _check_decoded(line)
        record = json.loads(line)
    except UserError as error:
        return error
    except (ValueError, RecursionError):
        return UserError(f"not JSON: {line.strip()[:40]!r}")
    if not isinstance(record, dict):
        return UserError(f"not a JSON object: {line.strip()[:40]!r}")
    return record


def _csv_records(lines: Iterable[str], delimiter: str) -> NumberedRecords:
    """Yield the rows below the header; a record is numbered by the first of its lines."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not "".join(cells).strip():
                continue
            if header is None:
                header = _parse_header(cells)
            else:
                yield line, _parse_cells(header, cells)
        except csv.Error as error:  # what follows cannot be told apart
            yield line, Unreadable(f"{error}; write cells with quotes or line ends as CSV does")
            return
        except UserError as error:
            yield line, error if header else Unreadable(str(error))
            if header is None:
                return


def _parse_header(cells: list[str]) -> list[str]:
    _check_decoded("".join(cells))
    names = [cell.strip() for cell in cells]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise UserError(f"two columns are called {shown(twice)}")
    try:
        check_columns(names)
    except UserError as error:
        raise UserError(f"the header {shown(' | '.join(names))}: {error}") from error
    return names


def _parse_cells(header: list[str], cells: list[str]) -> Record:
    _check_decoded("".join(cells))
    if len(cells) != len(header):
        raise UserError(f"{len(cells)} cells, but the header has {len(header)}")
    return {
        name: _parse_number(cell) if name in ("duration", "start", "end") else cell
        for name, cell in zip(header, cells, strict=True)
    }


def _parse_number(cell: str) -> float | str | None:
    """Return a cell's number; what is none stays as it is, and is refused with the row."""
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


# What reads a file's lines, and what ends them: JSON may hold U+2028 and a carriage return as they
# are, CSV line ends inside of quotes.
FORMATS: dict[str, tuple[Callable[[Iterable[str]], NumberedRecords], str]] = {
    ".jsonl": (_json_records, "\n"),
    ".json": (_json_records, "\n"),
    ".csv": (partial(_csv_records, delimiter=","), ""),
    ".tsv": (partial(_csv_records, delimiter="\t"), ""),
}
