"""Data sets of the `datasets` library: given from Python, saved, as parquet files, on the Hub."""

import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet
from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)

from blora_pyro.data.rows import (
    ALIASES,
    DETAILS,
    KNOWN,
    BadRow,
    OnBadRow,
    Record,
    Row,
    RowStream,
    Unreadable,
    check_columns,
    column,
    good_rows,
    located,
    parse_details,
    parse_row,
    parse_rows,
    stop,
    to_dataset,
)
from blora_pyro.errors import UserError, printable, reason

HfDataset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

SHARDS = 64  # that a data set on disk is streamed in
IN_MEMORY = 1 << 26  # bytes of parquet files that are read into memory, not through a cache
CHUNK = 200  # streamed rows that become one table: Arrow's binary columns hold 2 GB each


def dataset_split(
    data: HfDataset, split: str, name: str = "the data set", on_bad: OnBadRow = stop
) -> Dataset:
    """Return a split of a `datasets` object, with the columns of `read_manifest`.

    Audio may be a path (relative to the working folder), encoded bytes, {"path", "bytes"} or
    {"array", "sampling_rate"}; torchcodec is not needed. A stream, and arrays, are gathered row by
    row in memory; any other audio stays where it is.

    Args:
        data: a single set serves every split.
        split: of a dictionary of sets.
        name: of the data in messages.
        on_bad: called with the error of every bad row; where it does not raise, the row is left
            out.

    Raises:
        UserError: if the split or the columns are missing, there are no rows, or `on_bad` raises.
    """
    data, name = _select_split(data, split, name)
    if isinstance(data, Dataset) and len(data) and not _has_arrays(data):
        return _checked(data, name, on_bad)
    return _gathered(data, name, on_bad)


def dataset_stream(data: HfDataset, split: str, name: str = "the data set") -> RowStream:
    """Return the rows of `dataset_split` as a stream.

    A stream must not be shuffled yet: its buffer would be lost whenever a fit is resumed.
    """
    data, name = _select_split(data, split, name)
    if data.column_names is not None:
        data = data.select_columns(sorted(KNOWN & set(data.column_names)))
    data = _undecoded(data, name)
    if isinstance(data, Dataset):
        data = data.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(data))))
    return RowStream(data, partial(_streamed_row, name=name), name)


def _streamed_row(record: Record, name: str) -> Row:
    """Return a record as a row; a stream has no row numbers, so its origin is its path or text."""
    audio, text = (
        next((record[one] for one in names if record.get(one) is not None), None)
        for names in ALIASES.values()
    )
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    origin = f"{name}, the row with {printable(path if isinstance(path, str) else text, 80)!r}"
    with located(origin):
        return {**parse_row(record), "origin": origin}


def _select_split(data: HfDataset, split: str, name: str) -> tuple[Dataset | IterableDataset, str]:
    """Return one split, its columns checked, and its name in messages."""
    if isinstance(data, dict):
        if split not in data:
            splits = ", ".join(map(str, data)) or "none"
            raise UserError(f"{name} has no split {split!r}; its splits are: {splits}")
        data, name = data[split], f"{name}, {split}"
    data = data.with_format(None)  # torch's or numpy's, if the user has set one
    try:
        if data.column_names is not None:
            check_columns(data.column_names)
    except UserError as error:
        raise UserError(f"the columns of {name}: {error}") from error
    return data, name


def split_keys(data: HfDataset) -> list[str]:
    """Return the names of the splits of a `datasets` object; [] if it is a single set."""
    return [str(name) for name in data] if isinstance(data, dict) else []


def is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` made a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path) -> Dataset | DatasetDict:
    """Load what `save_to_disk` saved: Arrow files and JSON, nothing pickled.

    Raises:
        UserError: if it cannot be loaded.
    """
    with _loading(f"the saved data set {printable(folder)}"):
        return load_from_disk(str(folder))


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Return the parquet files of each split, named as the Hub names them.

    They are `{split}.parquet` or `{split}-*.parquet`, in the folder or its folder `data`.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        files.setdefault(path.stem.partition("-")[0], []).append(path)
    return files


def load_parquet(
    files: Iterable[Path], split: str, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load the parquet files of a split, or stream them.

    Small ones are read into memory; the others are mapped from the cache of `datasets`.

    Raises:
        UserError: if they cannot be loaded.
    """
    files = list(files)
    names = [glob.escape(str(path)) for path in files]
    with _loading(printable(names[0])):
        if not streaming and sum(path.stat().st_size for path in files) <= IN_MEMORY:
            tables = [pyarrow.parquet.read_table(path, partitioning=None) for path in files]
            return concatenate_datasets([Dataset(table) for table in tables])
        return load_dataset("parquet", data_files={split: names}, split=split, streaming=streaming)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # anything, as anything can be in the files
        cause = reason(error.__cause__ or error)
        raise UserError(f"cannot load {what}: {cause}; save it anew") from error


def load_hub(name: str, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a split of a data set of the Hub, through the cache of `datasets`; runs no code of it.

    Args:
        name: "owner/name" or "owner/name:config".
        split: of the data set.
        streaming: its files are read when they are needed, and not kept.

    Raises:
        UserError: if it cannot be reached or loaded, or has no such split.
    """
    repository, _, config = name.partition(":")
    with _hub_errors(name):
        return load_dataset(repository, config or None, split=split, streaming=streaming)


def hub_splits(name: str) -> list[str]:
    """Return the splits of a data set of the Hub.

    Raises:
        UserError: if it cannot be reached.
    """
    repository, _, config = name.partition(":")
    with _hub_errors(name):
        return list(get_dataset_split_names(repository, config or None))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, of the Hub, of any of the loaders
        if "torchcodec" in f"{error} {error.__cause__}":
            raise UserError(
                f"the Hub's {name!r} is a folder of audio files, which `datasets` reads by "
                "torchcodec only; download the repository and give its folder"
            ) from error
        raise UserError(
            f"no data at {name!r}: there is no such path, and from the Hub it cannot be loaded "
            f"({reason(error)}); give a path, or load it where there is a network"
        ) from error


def _has_arrays(data: Dataset) -> bool:
    feature = data.features[column(data.column_names, "audio")]
    return isinstance(feature, dict) and "array" in feature


def _undecoded(data: Any, name: str) -> Any:
    """Cast the columns of the type `Audio`, so that `datasets` does not decode them."""
    for known, feature in (data.features or {}).items():
        if isinstance(feature, Audio):
            data = _cast_audio(data, name, known)
    return data


def _cast_audio(data: Any, name: str, audio: str) -> Any:
    try:
        return data.cast_column(audio, Audio(decode=False))
    except Exception as error:  # pyarrow's own kinds
        raise UserError(
            f"the column {audio!r} of {name} is no audio ({reason(error)}); give paths, bytes, or "
            "arrays with their sampling_rate"
        ) from error


def _checked(data: Dataset, name: str, on_bad: OnBadRow) -> Dataset:
    """Check everything but the audio, which is not copied."""
    given = column(data.column_names, "audio")
    audio = _cast_audio(data.select_columns([given]), name, given)
    audio = audio if given == "audio" else audio.rename_column(given, "audio")
    others = data.select_columns(sorted(KNOWN & set(data.column_names) - {given}))
    rows = list(parse_rows(_records(others, name), parse_details))
    good = [number for number, row in enumerate(rows) if not isinstance(row, BadRow)]
    details = to_dataset(list(good_rows(rows, on_bad)), DETAILS)
    audio = audio if len(good) == len(rows) else audio.select(good)
    return concatenate_datasets([audio, details], axis=1)


def _gathered(data: Dataset | IterableDataset, name: str, on_bad: OnBadRow) -> Dataset:
    """Read every row, audio too, into memory."""
    rows = parse_rows(_records(_undecoded(data, name), name), parse_row)
    parts = []
    while chunk := list(itertools.islice(rows, CHUNK)):
        parts.append(to_dataset(list(good_rows(chunk, on_bad))))
    if not parts:
        raise UserError(f"{name} has no rows; give data with rows")
    return concatenate_datasets(parts)


def _records(data: Iterable[Record], name: str) -> Iterator[tuple[str, Record | UserError]]:
    """Yield origins, counted from 0 as in Python, and records."""
    rows = iter(data)
    for number in itertools.count():
        origin = f"{name}, row {number}"
        try:
            yield origin, next(rows)
        except StopIteration:
            return
        except Exception as error:  # of a generator, a network or a decoder
            if "torchcodec" in str(error):
                advice = "the column's type is Audio, so that `datasets` asks for torchcodec"
                error = ImportError(f"{advice}; yield the same without that type")
            yield origin, Unreadable(f"cannot be read: {reason(error)}")
            return
