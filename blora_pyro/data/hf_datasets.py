"""Data sets of the `datasets` library: given from Python, saved, as parquet files, on the Hub."""

import glob
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    Columns,
    LocatedRecord,
    OnBadRow,
    Record,
    Row,
    RowStream,
    Unreadable,
    check_columns,
    good_rows,
    parse_details,
    parse_located,
    renamed,
    renaming,
    stop,
    to_dataset,
)
from blora_pyro.errors import UserError, printable, reason

HfDataset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

CONVERTED = "refs/convert/parquet"  # the Hub's branch of Parquet files made of a data set
SHARDS = 64  # that a data set on disk is streamed in
IN_MEMORY = 1 << 26  # bytes of parquet files that are read into memory, not through a cache


def dataset_split(
    data: HfDataset,
    split: str,
    name: str = "the data set",
    on_bad: OnBadRow = stop,
    columns: Columns | None = None,
) -> Dataset:
    """Return a split of a `datasets` object for `load_split`; `name` is the data's in messages.

    Audio may be a path (relative to the working folder), encoded bytes, {"path", "bytes"} or
    {"array", "sampling_rate"}; torchcodec is not needed. A stream, and arrays, are gathered row by
    row in memory; any other audio stays where it is.
    """
    data, name = _select_split(data, split, name, columns or {})
    if isinstance(data, Dataset) and len(data):
        feature = data.features[check_columns(data.column_names)["audio"]]
        if not (isinstance(feature, dict) and "array" in feature):
            return _checked(data, name, on_bad)
    return _gathered(data, name, on_bad)


def dataset_stream(
    data: HfDataset, split: str, name: str = "the data set", columns: Columns | None = None
) -> RowStream:
    """Return the rows of `dataset_split` as a stream.

    A stream must not be shuffled yet: its buffer would be lost whenever a fit is resumed.
    """
    data, name = _select_split(data, split, name, columns or {})
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
    said = printable(path if isinstance(path, str) else text, 80)
    return parse_located(f"{name}, the row with {said!r}", record)


def _select_split(
    data: HfDataset, split: str, name: str, columns: Columns
) -> tuple[Dataset | IterableDataset, str]:
    """Return one split, its columns checked, and its name in messages."""
    if isinstance(data, dict):
        if split not in data:
            splits = ", ".join(map(str, data)) or "none"
            raise UserError(f"{name} has no split {split!r}; its splits are: {splits}")
        data, name = data[split], f"{name}, {split}"
    data = data.with_format(None)  # torch's or numpy's, if the user has set one
    try:
        if columns:
            data = _renamed(_undecoded(data, name), columns)
        if data.column_names is not None:
            check_columns(data.column_names)
    except UserError as error:
        raise UserError(f"the columns of {name}: {error}") from error
    return data, name


def _renamed(data: Any, columns: Columns) -> Any:
    if data.column_names is None:  # a stream that has not begun
        return data.map(partial(renamed, columns=columns))
    new = renaming(data.column_names, columns)
    data = data.remove_columns([name for name, known in new.items() if known is None])
    return data.rename_columns({name: known for name, known in new.items() if known})


def split_keys(data: HfDataset) -> list[str]:
    """Return the names of its splits; [] if it is a single set."""
    return [str(name) for name in data] if isinstance(data, dict) else []


def is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` made a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path) -> Dataset | DatasetDict:
    """Load what `save_to_disk` saved: Arrow files and JSON, nothing pickled."""
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
    files: list[Path], split: str, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load the parquet files of a split, or stream them.

    Small ones are read into memory; the others are mapped from the cache of `datasets`.
    """
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
    """Load a split of "owner/name" or "owner/name:config" of the Hub; runs no code of it.

    It goes through the cache of `datasets`; streamed files are read when they are needed, and not
    kept.
    """
    with _hub_errors(name):
        return _asked(load_dataset, name, split=split, streaming=streaming)


def hub_splits(name: str) -> list[str]:
    """Return the splits of a data set of the Hub, named as in `load_hub`."""
    with _hub_errors(name):
        return list(_asked(get_dataset_split_names, name))


def _asked(function: Callable[..., Any], name: str, **options: Any) -> Any:
    """Call a function of `datasets` for a data set of the Hub, named as in `load_hub`.

    Of a repository that is a script, as google/fleurs is, the Parquet files are taken that the Hub
    has made of it, in a folder a configuration.
    """
    repository, _, config = name.partition(":")
    try:
        return function(repository, config or None, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    return function(repository, data_dir=config or None, revision=CONVERTED, **options)


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
    given, text = check_columns(data.column_names).values()
    audio = _cast_audio(data.select_columns([given]), name, given)
    audio = audio if given == "audio" else audio.rename_column(given, "audio")
    others = data.select_columns(sorted(KNOWN & set(data.column_names) - {given}))
    parse = partial(parse_details, text=text, audio=given)
    good = array("q")

    def rows() -> Iterator[Row]:
        for number, (origin, record) in enumerate(_records(others, name)):
            for row in good_rows([(origin, record)], parse, on_bad):
                good.append(number)
                yield row

    details = to_dataset(rows(), DETAILS)
    audio = audio if len(good) == len(data) else audio.select(good)
    return concatenate_datasets([audio, details], axis=1)


def _gathered(data: Dataset | IterableDataset, name: str, on_bad: OnBadRow) -> Dataset:
    """Read every row, audio too, into memory."""
    records = _records(_undecoded(data, name), name)
    if (first := next(records, None)) is None:
        raise UserError(f"{name} has no rows; give data with rows")
    return to_dataset(good_rows(itertools.chain([first], records), on_bad=on_bad))


def _records(data: Iterable[Record], name: str) -> Iterator[LocatedRecord]:
    """Yield origins, counted from 0 as in Python, and records."""
    number = 0
    try:
        for record in data:
            yield f"{name}, row {number}", record
            number += 1
    except Exception as error:  # of a generator, a network or a decoder
        if "torchcodec" in str(error):
            advice = "the column's type is Audio, so that `datasets` asks for torchcodec"
            error = ImportError(f"{advice}; yield the same without that type")
        yield f"{name}, row {number}", Unreadable(f"cannot be read: {reason(error)}")
