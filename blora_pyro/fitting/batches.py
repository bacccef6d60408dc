"""The batches of a fit: their order, their parts, and SpecAugment."""

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperModel

from blora_pyro.data import Batch, Examples, SoftTargets, Stream, StreamPosition, batch_indices
from blora_pyro.fitting.processes import Processes

# (batch, indices of its utterances, number of the batch) -> the batch with soft targets or encoder
# states
Teacher = Callable[[Batch, Sequence[int], int], Batch]

MASKED_SHARES = {"time": 0.05, "feature": 0.1}  # of frames and mel bins, where a base has none
WIDEST_SPAN = 0.25  # of the window or of the bins


def batches(
    examples: Examples | Stream,
    batch_size: int,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    *,
    start: int = 0,
    position: StreamPosition | None = None,
    teacher: Teacher | None = None,
    processes: Processes | None = None,
) -> Generator[tuple[Batch | None, StreamPosition | None], None, None]:
    """Yield batches without end; with each of a stream the position that it was read at.

    Args:
        examples: Training data. The order of `Examples` is that of `batch_indices`.
        batch_size: Utterances in a batch, of all processes together.
        seed: Seed of the order, on which alone it depends.
        weights: Weights of the sources, see `batch_indices`.
        start: Number of the first batch; earlier ones are not made.
        position: Where a stream continues; None is its beginning.
        teacher: Completes every batch of `Examples`.
        processes: Each yields its part of every batch, None where there are too few utterances.
    """
    processes = processes or Processes()
    if isinstance(examples, Stream):
        yield from examples.batches(batch_size, position, processes.rank, processes.count)
        return
    order = batch_indices(examples.sources, batch_size, seed, weights)
    for number, indices in islice(enumerate(order), start, None):
        own = processes.share(indices)
        batch = examples.batch(own) if own else None
        yield batch if batch is None or teacher is None else teacher(batch, own, number), None


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Split the utterances of a batch into `count` parts of nearly equal size, or one in each."""
    count = min(count, len(batch.input_features))
    features, inputs = (
        part.tensor_split(count) for part in (batch.input_features, batch.decoder_input_ids)
    )
    labels, sources, states = (
        [None] * count if part is None else part.tensor_split(count)
        for part in (batch.labels, batch.sources, batch.encoder_states)
    )
    columns = zip(features, inputs, labels, sources, states, strict=True)
    parts = [Batch(*own[:3], sources=own[3], encoder_states=own[4]) for own in columns]
    if (soft := batch.soft) is None:
        return parts
    targets = (soft.decoder_input_ids, soft.log_probs, soft.is_target)
    softs = zip(*(column.tensor_split(count) for column in targets), strict=True)
    split = []
    for part, (tokens, log_probs, is_target) in zip(parts, softs, strict=True):
        # `Objective` weights a part by its share of the labels; soft targets are to count alike.
        weight = soft.weight * int(is_target.sum()) / soft.num_tokens
        weight /= part.num_tokens / batch.num_tokens
        split.append(replace(part, soft=SoftTargets(tokens, log_probs, is_target, weight)))
    return split


class SpecAugment:
    """Whisper's own SpecAugment (Park et al., arXiv 1904.08779), as transformers implements it.

    Random spans of frames and of mel bins are set to 0, which is about the mean of Whisper's
    features. Lengths and shares are those of the base's configuration (`mask_time_prob`,
    `mask_time_length`, ...), also where its `apply_spec_augment` is off. Where a share is 0, as in
    OpenAI's checkpoints for the bins, it is 5% of the frames (transformers' default) or 10% of the
    bins: no more than the mildest policy of the paper, LB, which masks 4% and 17% on average. No
    span is wider than a quarter of the axis. The random numbers are NumPy's global ones.
    """

    def __init__(self, config: WhisperConfig) -> None:
        """Take lengths and shares from the base's configuration."""
        config = copy.copy(config)
        config.apply_spec_augment = True
        frames = 2 * config.max_source_positions
        for axis, size in (("time", frames), ("feature", config.num_mel_bins)):
            share = getattr(config, f"mask_{axis}_prob") or MASKED_SHARES[axis]
            length = min(getattr(config, f"mask_{axis}_length"), max(1, int(WIDEST_SPAN * size)))
            setattr(config, f"mask_{axis}_prob", share)
            setattr(config, f"mask_{axis}_length", length)
        self.config = config

    def __call__(self, batch: Batch) -> Batch:
        """Return a copy of the batch with masked features."""
        # transformers masks in training mode only, which would also bring dropout
        whisper = SimpleNamespace(config=self.config, training=True)
        features = WhisperModel._mask_input_features(whisper, batch.input_features.clone())
        return replace(batch, input_features=features)
