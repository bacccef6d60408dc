"""Training data as a stream: rows are read, decoded and featurised as a fit draws them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from blora_pyro.data.collation import Batch, Examples
from blora_pyro.data.features import Heard, featurise_row
from blora_pyro.data.prompts import NO_MAP, NOTHING, EncodedRow, Encoder, Suppressed
from blora_pyro.data.rows import (
    BadRow,
    BadRows,
    OnBadRow,
    Record,
    Row,
    RowStream,
    all_bad,
    located,
    stop,
)
from blora_pyro.errors import UserError, reason
from blora_pyro.options import SHUFFLE_BUFFER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

SAMPLE = 16  # rows that are looked at before a fit
READERS = 4  # threads; torch may use several cores in each

StreamPosition = dict[str, Any]  # where a process is in its stream, JSON; see `_records`
START: StreamPosition = {"epoch": 0, "block": 0, "taken": 0, "state": None}

OnRow = Callable[[EncodedRow, Heard], object]  # a good row, and what is known of its audio

_Good = tuple[EncodedRow, Tensor]  # a row, and its log-mels, (mels, frames), float16


class Stream:
    """Training data of any size; no more of them is in memory than a buffer of rows, undecoded.

    Every epoch has every row once. The shards come in a new order (where the data have several),
    and their rows are shuffled in blocks of the buffer's size. The order depends on the seed, the
    epoch and the number of processes alone.

    Attributes:
        sample: the first rows of the data, as `Examples`.
    """

    def __init__(
        self,
        rows: RowStream,
        feature_extractor: "WhisperFeatureExtractor",
        tokenizer: "PreTrainedTokenizerBase",
        task: str = "transcribe",
        max_tokens: int = 448,
        *,
        language: str | None = None,
        suppressed: Suppressed = NOTHING,
        language_map: Mapping[str, str] = NO_MAP,
        buffer: int = SHUFFLE_BUFFER,
        seed: int = 0,
        trim: bool = False,
        on_bad: OnBadRow = stop,
        on_row: OnRow = lambda row, heard: None,
    ) -> None:
        """Read the sample.

        The arguments are those of `Examples`, but that `rows` are those of `stream_split`, and
        `on_bad` is called again in every epoch, from another thread, as is `on_row` with the good
        rows of the first. `buffer` rows are shuffled at a time, by the `seed`; 1 keeps their order
        within a shard.

        Raises:
            UserError: if there is no good row, or by `on_bad`.
        """
        self.rows, self.feature_extractor = rows, feature_extractor
        # Rust's tokenizers can't be used by two threads at once.
        self._encoder = Encoder(
            copy.deepcopy(tokenizer), language, task, max_tokens, suppressed, language_map
        )
        self.buffer, self.seed, self._trim = buffer, seed, trim
        self._on_bad, self._on_row = on_bad, on_row
        self.sample = self._sample(BadRows(on_bad))

    @property
    def main_language(self) -> str:
        """The most frequent language of the sample."""
        return self.sample.main_language

    @property
    def fingerprint(self) -> str:
        """A text that changes with the texts and languages of the sample."""
        return self.sample.fingerprint

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return these rows of the sample."""
        return self.sample.batch(indices)

    def batches(
        self,
        batch_size: int,
        position: StreamPosition | None = None,
        rank: int = 0,
        count: int = 1,
    ) -> Iterator[tuple[Batch, StreamPosition]]:
        """Yield endless batches, each with the position before it; the next is made meanwhile.

        Of `count` processes each has its own shards, or where their number is no multiple of that
        of the processes every `count`-th row, and draws its part of every batch from them: the one
        of number `rank`. A batch of `batch_size` is that of all processes together, and may reach
        into the next epoch. A position is where a batch begins; None is the beginning. Close the
        iterator when it is not needed any more.

        Raises:
            UserError: if the data can't be read, a process has no good rows, or by `on_bad`.
        """
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as ahead:
            batches = self._batches(batch_size, position or START, rank, count, readers)
            following = ahead.submit(next, batches)
            while True:
                drawn = following.result()
                following = ahead.submit(next, batches)
                yield drawn

    def _batches(
        self,
        batch_size: int,
        position: StreamPosition,
        rank: int,
        count: int,
        readers: ThreadPoolExecutor,
    ) -> Iterator[tuple[Batch, StreamPosition]]:
        records = self._records(position, rank, count)
        size = len(range(rank, batch_size, count))
        if not size:
            raise UserError(
                f"a batch has {batch_size} utterances for {count} processes; give a batch_size of "
                f"{count} or more"
            )
        good_epoch = position["epoch"]  # the last one that had a good row
        while True:
            rows: list[_Good] = []
            start = position
            while len(rows) < size:
                drawn = list(islice(records, size - len(rows)))
                position = drawn[-1][1]
                first = [record for record, at in drawn if not at["epoch"]]
                later = [record for record, at in drawn if at["epoch"]]
                rows += self._good_rows(first, readers.map, self._on_bad, self._on_row)
                rows += self._good_rows(later, readers.map, self._on_bad)
                if rows:
                    good_epoch = position["epoch"]
                elif position["epoch"] > good_epoch + 1:
                    raise UserError(f"{self._name(rank, count)} has nothing but bad rows")
            yield Examples.of_rows(rows, self._encoder.end, self._trim).batch(range(size)), start

    def _records(
        self, position: StreamPosition, rank: int, count: int
    ) -> Iterator[tuple[Record, StreamPosition]]:
        """Yield endless records from a position on, each with the position behind it.

        A block is `buffer` rows on end. A position is the epoch, the number of the block, the state
        of `datasets` before it, and how many of its rows have been taken.
        """
        stream = split_dataset_by_node(self.rows.records, rank, count)
        epoch, block, taken, state = (position[name] for name in START)
        while True:
            stream.set_epoch(self.seed * 1_000_003 + epoch + 1)  # orders the shards
            if state:
                stream.load_state_dict(state)
            reader, empty = self._read(stream), not state
            while rows := list(islice(reader, self.buffer)):
                empty = False
                order = np.random.default_rng([self.seed, epoch, block]).permutation(len(rows))
                later = stream.state_dict()
                for number, row in enumerate(order.tolist()):
                    record, rows[row] = rows[row], {}  # what is taken is not held
                    if number >= taken:
                        at = {"epoch": epoch, "block": block, "taken": number + 1, "state": state}
                        yield record, at
                block, taken, state = block + 1, 0, later
            if empty:
                raise UserError(f"{self._name(rank, count)} has no rows; give data with rows")
            epoch, block, state = epoch + 1, 0, None

    def _read(self, records: Any) -> Iterator[Record]:
        try:
            yield from records
        except UserError:
            raise
        except Exception as error:  # of a generator, a network or a file
            raise UserError(f"{self.rows.name} cannot be read on: {reason(error)}") from error

    def _good_rows(
        self,
        records: list[Record],
        apply: Callable[..., Iterator[Any]],
        on_bad: OnBadRow,
        on_row: OnRow = lambda row, heard: None,
    ) -> list[_Good]:
        """Parse, tokenise and featurise records; return the good ones in their order."""
        rows: list[tuple[Row, EncodedRow]] = []
        for record in records:
            try:
                row = self.rows.parse(record)
                rows.append((row, self._encoder.encode_row(row, row["audio"]["path"])))
            except BadRow as error:
                on_bad(error)
        good = []
        featurised = apply(self._featurise, [row for row, _ in rows])
        for (_, encoded), found in zip(rows, featurised, strict=True):
            if isinstance(found, BadRow):
                on_bad(found)
            else:
                features, heard = found
                on_row(encoded, heard)
                good.append((encoded, features))
        return good

    def _featurise(self, row: Row) -> tuple[Tensor, Heard] | BadRow:
        """Return log-mels, (mels, frames), float16, and what is known of the audio, or wrong."""
        try:
            with located(row["origin"]):
                return featurise_row(row, self.feature_extractor)
        except BadRow as error:
            return error

    def _sample(self, bad: BadRows) -> Examples:
        """Return the good ones of the first rows; if there are none, the first that is good."""
        good: list[_Good] = []
        for number, record in enumerate(self._read(self.rows.records)):
            if good and number >= SAMPLE:
                break
            good += self._good_rows([record], map, bad)
        if good:
            return Examples.of_rows(good, self._encoder.end, self._trim)
        raise UserError(all_bad(bad) if bad else f"{self.rows.name} has no rows; give some")

    def _name(self, rank: int, count: int) -> str:
        name = self.rows.name
        return name if count == 1 else f"process {rank + 1} of {count}: its part of {name}"
