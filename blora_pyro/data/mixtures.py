"""Several sources of data as one: their names, their rows, and the order of drawing them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from blora_pyro.data.rows import BadRow, OnBadRow, all_bad, stop
from blora_pyro.data.sources import TABLES, Source, describe_source, load_split
from blora_pyro.errors import UserError, printable

_NAMED = re.compile(r"([\w.-]+)=(.+)")


def as_sources(value: Any) -> tuple[Source, ...]:
    """One source or several, or sources by name, as a tuple.

    Raises:
        UserError: if there is none.
    """
    if isinstance(value, Mapping) and not isinstance(value, TABLES):
        value = tuple(value.values())
    one = isinstance(value, (str, os.PathLike, *TABLES))
    sources = (value,) if one else tuple(value)
    if not sources:
        raise UserError("data names no source; give one or more")
    return sources


def as_domains(value: Any) -> tuple[Source, ...] | dict[str, Source]:
    """Sources by name, if they are, or a text among them is "NAME=SOURCE"; else as a tuple.

    Raises:
        UserError: if there is none, or two have one name.
    """
    sources = as_sources(value)
    if isinstance(value, Mapping) and not isinstance(value, TABLES):
        return dict(value)
    texts = [source for source in sources if isinstance(source, str)]
    if len(texts) == len(sources) and any(map(_name_and_source, texts)):
        return named_sources(texts)
    return sources


def _name_and_source(text: str) -> re.Match[str] | None:
    """Of "NAME=SOURCE"; None for a text that is a path as it stands, or has no name."""
    return None if os.path.exists(text) else _NAMED.fullmatch(text)


def named_sources(value: Mapping[str, Source] | Sequence[str]) -> dict[str, Source]:
    """Sources by name: a mapping as it is, of texts "NAME=SOURCE", or SOURCE as its own name.

    A text that is a path as it stands is not taken apart.

    Raises:
        UserError: if two have one name.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (str, *TABLES)):
        raise UserError("backward must be a list of sources, or sources by name")
    found: dict[str, Source] = {}
    for text in map(str, value):
        match = _name_and_source(text)
        name, source = match.groups() if match else (text, text)
        if name in found:
            raise UserError(f"two sets are called '{name}'; name them apart: NAME=SOURCE")
        found[name] = source
    return found


def load_mixture(
    sources: Source | Sequence[Source],
    split: str,
    on_bad: OnBadRow = stop,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read a split of one or more sources, one after the other, as `load_split` reads it.

    A single source that is a manifest serves any split. The rows have one column more, `source`:
    the place of theirs among `sources`.

    Args:
        sources: one or more.
        split: of all of them.
        on_bad: told of bad rows.
        limit: rows of the first source, drawn at random, their order kept; None is all.
        seed: of that draw.

    Raises:
        UserError: as `load_split`, or if a source has nothing but bad rows.
    """
    parts = []
    for place, source in enumerate(as_sources(sources)):
        bad: list[BadRow] = []

        def tell(error: BadRow, place: int = place, bad: list[BadRow] = bad) -> None:
            error.source = place
            bad.append(error)
            on_bad(error)

        part = load_split(source, split, tell)
        if not len(part):
            raise UserError(f"{printable(describe_source(source))}, {split}: {all_bad(bad)}")
        part = part.add_column("source", [place] * len(part))
        if place == 0 and limit is not None and limit < len(part):
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
            part = part.select(sorted(drawn[:limit].tolist()))
        parts.append(part)
    return concatenate_datasets(parts)


def check_weights(weights: Sequence[float] | None, sources: Sequence[Source]) -> None:
    """Refuse weights that are not one number above 0 for each source; None passes.

    Raises:
        UserError: saying what was given.
    """
    if weights is None:
        return
    if len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"data_weights is {', '.join(map(str, weights))} for {len(sources)} source(s) of data; "
            "give one number above 0 for each"
        )


def batch_indices(
    sources: Sequence[int],
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Iterator[list[int]]:
    """Endless batches of row numbers; their order depends on the arguments alone.

    Without weights: a fresh permutation of all rows every epoch, the last batch of an epoch kept
    short. With weights every place in a batch is drawn from a source in proportion to its weight,
    and each source is gone through in fresh permutations of its own.

    Args:
        sources: (n,), the source of every row, from 0.
        batch_size: rows in a batch.
        seed: of the order.
        weights: one for each source, to any scale.

    Raises:
        UserError: if a source with a weight has no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    if weights is None:
        while True:
            for chosen in torch.randperm(len(sources), generator=generator).split(batch_size):
                yield chosen.tolist()
    rows = [[row for row, one in enumerate(sources) if one == s] for s in range(len(weights))]
    if not all(rows):
        raise UserError(f"source {rows.index([]) + 1} of data has no rows; leave it out")
    streams = [_permuted(one, generator) for one in rows]
    chances = torch.tensor(weights, dtype=torch.float64)
    while True:
        drawn = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
        yield [next(streams[source]) for source in drawn.tolist()]


def _permuted(rows: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[place]
