"""Several sources of data as one: their names, their rows, and the order of drawing them."""

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets

from blora_pyro.data.rows import BadRow, OnBadRow, all_bad, stop
from blora_pyro.data.sources import load_split
from blora_pyro.errors import UserError, printable
from blora_pyro.sources import Source, as_sources, describe_source


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
