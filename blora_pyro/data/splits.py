"""The splits of a source (a manifest, folder, corpus, data set or Hub id), and mixtures of them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from blora_pyro.data.containers import AUDIO_SUFFIXES
from blora_pyro.data.hf_datasets import (
    HfDataset,
    dataset_split,
    dataset_stream,
    hub_splits,
    is_saved,
    load_hub,
    load_parquet,
    load_saved,
    parquet_files,
    split_keys,
)
from blora_pyro.data.manifest import (
    FORMATS,
    manifest_rows,
    manifest_splits,
    manifest_stream,
    read_manifest,
)
from blora_pyro.data.rows import BadRows, Columns, OnBadRow, Row, RowStream, all_bad, stop
from blora_pyro.errors import UserError, printable
from blora_pyro.files import cache_dir
from blora_pyro.options import POCKET_DOMAINS as DOMAINS
from blora_pyro.options import POCKET_LANGUAGES as LANGUAGES
from blora_pyro.sources import Source, as_sources, describe_source, is_table

POCKET_DIR = Path(__file__).parent / "pocket"  # the shipped assets, a folder without code
MODEL_DIR = POCKET_DIR / "model"
_CORPORA = (*DOMAINS, *LANGUAGES)

_OBJECT = "<"  # how `describe_source` describes an object, and no source is named
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?")


def load_split(
    source: Source, split: str, on_bad: OnBadRow = stop, columns: Columns | None = None
) -> Dataset:
    """Read a split of a source, with the columns of `read_manifest`.

    Args:
        source: an object of `datasets`, streaming or not (a stream is read to its end into memory;
            a single set is the same for every split); or a path, or where no such path exists the
            name of a built-in corpus ("de-en", "de", ...), or else a data set of the Hub,
            "owner/name" or "owner/name:config". A path may be
            - a manifest, the same for every split unless it has a column `split`;
            - a parquet file, the same for every split;
            - a folder with `{split}.jsonl` (or .json, .csv, .tsv), `{split}/metadata.csv` (or
              another such ending), or one `metadata.csv` for all, as a manifest;
            - a folder that `save_to_disk` made;
            - a folder with parquet files as on the Hub, `{split}-*.parquet`;
            - a folder of nothing but audio files, whose texts are empty: those of `{split}/`, or
              where there are no such folders every other file for test, and the rest for dev.
        split: "train", "dev", "test", or whatever the source has.
        on_bad: called with the error of every bad row; where it does not raise, the row is left
            out, and there may be none left.
        columns: names that columns have in the source, by those of `read_manifest`; the built-in
            corpora keep theirs.

    Raises:
        UserError: if the source is none of these, lacks the split, or `read_manifest` raises.
    """
    found = _find(source, split, columns)
    if found.load is None:
        return read_manifest(found.name, found.pick, on_bad, found.columns)
    return dataset_split(found.load(False), split, found.name, on_bad, found.columns)


def row_batches(
    source: Source, split: str, on_bad: OnBadRow, columns: Columns | None, size: int
) -> Iterator[tuple[list[Row], int]]:
    """Yield the rows of `load_split` in lists of `size`, and about how many rows there are.

    No more than a list of a manifest's is in memory.
    """
    found = _find(source, split, columns)
    if found.load is None:
        with open(found.name, "rb") as file:
            about = sum(piece.count(b"\n") for piece in iter(partial(file.read, 1 << 20), b""))
        rows = manifest_rows(found.name, found.pick, on_bad, found.columns)
        while batch := list(islice(rows, size)):
            yield batch, about
        return
    data = dataset_split(found.load(False), split, found.name, on_bad, found.columns)
    for some in data.iter(size):
        values = zip(*some.values(), strict=True)
        yield [dict(zip(some, row, strict=True)) for row in values], len(data)


def stream_split(source: Source, split: str, columns: Columns | None = None) -> RowStream:
    """Return a split of a source of `load_split` as a stream.

    Shards are the files of a data set of the Hub or of a folder of parquet files, parts of one that
    was saved or is an object of `datasets`, and the shards of a stream. A manifest is one shard.

    Raises:
        UserError: if the source is none of these, or lacks the split or columns.
    """
    found = _find(source, split, columns)
    if found.load is None:
        return manifest_stream(found.name, found.pick, found.columns)
    return dataset_stream(found.load(True), split, found.name, found.columns)


def load_mixture(
    sources: Source | Sequence[Source],
    split: str,
    on_bad: OnBadRow = stop,
    limit: int | None = None,
    seed: int = 0,
    columns: Columns | None = None,
) -> Dataset:
    """Read a split of one or more sources, one after the other, as `load_split` reads it.

    The rows have one column more, `source`: the index of theirs. With a `limit`, that many rows of
    the first source are drawn at random, by `seed`, their order kept.

    Raises:
        UserError: as `load_split`, or if a source has nothing but bad rows.
    """
    parts = []
    for index, source in enumerate(as_sources(sources)):
        bad = BadRows(on_bad, index)
        part = load_split(source, split, bad, columns)
        if not len(part):
            raise UserError(f"{printable(describe_source(source))}, {split}: {all_bad(bad)}")
        part = part.add_column("source", np.full(len(part), index))
        if index == 0 and limit is not None and limit < len(part):
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
            part = part.select(sorted(drawn[:limit].tolist()))
        parts.append(part)
    return concatenate_datasets(parts)


def split_names(source: Source) -> list[str]:
    """Return the names of the splits that a source has; [] where it is one set for them all.

    Raises:
        UserError: if the source is none of those of `load_split`.
    """
    if is_table(source):
        return split_keys(source)
    name = str(source)
    if os.path.isfile(name):
        return [] if _is_parquet(name) else manifest_splits(name)
    if is_hub_id(name):
        return hub_splits(name)
    folder = _folder(name)
    if is_saved(folder):
        return split_keys(load_saved(folder))
    files = [path for path in folder.iterdir() if path.suffix.lower() in FORMATS]
    names = {path.stem for path in files if path.is_file() and path.stem != "metadata"}
    names |= {path.name for path in folder.iterdir() if path.is_dir() and _only(path, "metadata")}
    if (folder / "clips").is_dir():  # Common Voice's, whose other tables are no splits
        names = names & {"train", "dev", "test"} or names
    if not names and (manifest := _only(folder, "metadata")):
        return manifest_splits(manifest)
    return sorted(names or parquet_files(folder) or audio_files(folder))


def audio_files(folder: Path) -> dict[str, list[Path]]:
    """Return the audio files of each split of a folder that holds nothing else; {} of another.

    There is none for training, which needs texts.
    """
    inside = [path for path in (*folder.iterdir(), *folder.glob("*/*")) if path.is_file()]
    if any(path.suffix.lower() in (*FORMATS, ".parquet") for path in inside):
        return {}
    heard = sorted(path for path in inside if path.suffix.lower() in AUDIO_SUFFIXES)
    parts = {
        name: [path for path in heard if path.parent == folder / name]
        for name in ("dev", "validation", "test")
    }
    if not any(parts.values()):
        files = [path for path in heard if path.parent == folder]
        parts = {"dev": files[1::2], "test": files[::2]}
    return {name: files for name, files in parts.items() if files}


def is_hub_id(name: str) -> bool:
    """Tell whether a name that is no path and no built-in corpus has the form of a Hub id."""
    manifest = Path(name).suffix.lower() in FORMATS
    return not (os.path.exists(name) or manifest) and bool(_HUB_ID.fullmatch(name))


def corpus_dir(name: str) -> Path:
    """Return the folder of a built-in corpus, which holds `{split}.parquet`.

    A corpus that is not shipped is looked for in `$BLORA_PYRO_CACHE/pocket/` (by default
    `~/.cache/blora-pyro/pocket/`), where `recipes/pocket/build.py` can put it.

    Raises:
        UserError: if no corpus has this name, or it is neither shipped nor built.
    """
    if name not in _CORPORA:
        raise UserError(f"no built-in corpus is called {name!r}; choose from {', '.join(_CORPORA)}")
    folders = [POCKET_DIR]
    if cache := cache_dir():
        folders.append(cache / "pocket")
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(
        f"the built-in corpus {name!r} is not in {' or '.join(map(str, folders))}; "
        "make it with: python recipes/pocket/build.py"
    )


@dataclass(frozen=True)
class _Found:
    """Where a split is: in a manifest, or in a data set."""

    name: str  # the manifest's path, or the data set's name in messages
    pick: str | None = None  # the split to be picked from the rows of a manifest; None is all
    load: Callable[[bool], HfDataset] | None = None  # a data set, as a stream or not
    columns: Columns | None = None  # what its columns are called; None is as usual


def _find(source: Source, split: str, columns: Columns | None) -> _Found:
    if is_table(source):
        return _Found("the data set", load=lambda streaming: source, columns=columns)
    name = str(source)
    if os.path.isfile(name):
        if _is_parquet(name):
            load = partial(load_parquet, [Path(name)], split)
            return _Found(printable(name), load=load, columns=columns)
        return _Found(name, split, columns=columns)
    if is_hub_id(name):
        load = partial(load_hub, name, split)
        return _Found(f"{name}, {split}", load=load, columns=columns)
    folder = _folder(name)
    if not os.path.exists(name):  # a built-in corpus
        columns = None
    if is_saved(folder):
        return _Found(printable(folder), None, lambda streaming: load_saved(folder), columns)
    if manifest := _only(folder, split) or _only(folder / split, "metadata"):
        return _Found(str(manifest), columns=columns)
    if manifest := _only(folder, "metadata"):
        return _Found(str(manifest), split, columns=columns)
    if files := parquet_files(folder).get(split):
        load = partial(load_parquet, files, split)
        return _Found(f"{printable(folder)}, {split}", load=load, columns=columns)
    if heard := audio_files(folder).get(split):
        rows = [{"audio": str(path), "text": ""} for path in heard]
        return _Found(
            f"{printable(folder)}, {split}", load=lambda streaming: Dataset.from_list(rows)
        )
    splits = ", ".join(split_names(folder)) or "none"
    raise UserError(
        f"{printable(folder)} has no {split}.jsonl (.csv, .tsv, or {split}/metadata.csv); "
        f"its splits are: {splits}"
    )


def _is_parquet(name: str) -> bool:
    return Path(name).suffix.lower() == ".parquet"


def _folder(name: str) -> Path:
    if not os.path.exists(name) and name in _CORPORA:
        return corpus_dir(name)
    if name.startswith(_OBJECT):
        raise UserError(f"the data were an object from Python, {name}; give it again")
    if not os.path.isdir(name):
        raise UserError(
            f"no data at '{printable(name)}'; give a manifest ({', '.join(FORMATS)}), a folder of "
            "manifests (train.jsonl, ...), a Hub data set (owner/name), or a built-in corpus: "
            f"{', '.join(_CORPORA)}"
        )
    return Path(name)


def _only(folder: Path, stem: str) -> Path | None:
    """Return the one manifest of this name, with whatever ending; None if there is none."""
    found = [path for suffix in FORMATS if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{printable(folder)} has {names}; keep one of them")
    return found[0] if found else None
