"""Decoding of one window of audio by transformers' `generate`, and scores of tokens."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro.errors import UserError
from blora_pyro.models import encoder
from blora_pyro.models.base import Base
from blora_pyro.models.folders import quiet_transformers
from blora_pyro.models.logits import EndLoops, Limit, Sample, Sampling, Spell

TIME_PRECISION = 0.02  # seconds between two timestamp tokens
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # two names of one token, below <|notimestamps|>
THRESHOLDS = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")

Prompts = Sequence[Sequence[int]]  # of one length


class HasNet(Protocol):
    """What greedy decoding to tokens needs of a `Base`."""

    @property
    def net(self) -> WhisperForConditionalGeneration:
        """The Whisper."""


@dataclass(frozen=True)
class Piece:
    """The transcript between two timestamps.

    Attributes:
        start: Seconds from the window's start.
        end: Seconds from the window's start.
        tokens: Tokens of the text between their two timestamps, which are included.
    """

    start: float
    end: float
    tokens: list[int]


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of a transcript, nats.

    Attributes:
        log_probs: Of each token between the prompt and the end token, (tokens,).
        mean: Mean over the tokens, the end token included, as OpenAI's `avg_logprob`.
        no_speech: Probability that there is no speech; 0 where the model has no token for that.
    """

    log_probs: Tensor
    mean: float
    no_speech: float


def timestamp_begin(base: Base) -> int | None:
    """Return the id of the first timestamp token; None if they do not cover the window."""
    last = getattr(base.net.generation_config, "no_timestamps_token_id", None)
    if last is None:
        return None
    needed = round(base.feature_extractor.chunk_length / TIME_PRECISION) + 1
    return last + 1 if base.net.config.vocab_size > last + needed else None


def text_of(base: Base, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without timestamps and special tokens."""
    begin = timestamp_begin(base)
    kept = [token for token in tokens if begin is None or token < begin]
    return base.tokenizer.decode(kept, skip_special_tokens=True).strip()


def alike_in_length(prompts: Prompts, size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of one length, up to `size` at a time, as `decode` takes them."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), size):
            yield indices[first : first + size]


@torch.inference_mode()
def encode(base: Base, features: Tensor) -> Tensor:
    """Return the encoder's states, (batch, positions, width), of log-mels (batch, mels, frames)."""
    net, features = base.net, features.to(base.net.device)
    if not base.half_encoder:
        return encoder.encode(net, features)
    with torch.autocast(net.device.type, torch.bfloat16):
        return encoder.encode(net, features).to(net.dtype)


@torch.inference_mode()
def decode(
    base: HasNet,
    encoded: Tensor,
    prompts: Prompts,
    limits: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    is_loop: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Return transcripts as tokens, without the prompts and the end token.

    Args:
        base: The net.
        encoded: Of `encode`.
        prompts: Of all transcripts, of one length.
        limits: The most tokens that each may have; None is what the decoder has room for.
        sampling: None is greedy.
        is_loop: Tells of tokens that repeat themselves whether to end them there; see `EndLoops`.
    """
    options = _options(base, encoded, prompts, limits, sampling, is_loop)
    with _without_thresholds(base), quiet_transformers():
        found = base.net.generate(return_timestamps=False, **options)
    end = base.net.config.eos_token_id  # also the padding
    rows = found[:, len(prompts[0]) :].tolist()
    return [[token for token in row if token != end] for row in rows]


@torch.inference_mode()
def decode_timed(
    base: Base,
    encoded: Tensor,
    prompts: Prompts,
    limits: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> list[list[Piece]]:
    """Return transcripts in pieces with their times; prompts are without `<|notimestamps|>`.

    An unfinished piece after the last pair of timestamps is left out. Arguments as in `decode`.
    """
    options = _options(base, encoded, prompts, limits, sampling)
    with _without_thresholds(base), quiet_transformers():
        found = base.net.generate(return_timestamps=True, return_segments=True, **options)
    return [
        [Piece(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in row]
        for row in found["segments"]
    ]


@torch.inference_mode()
def time_pieces(
    base: Base,
    encoded: Tensor,
    prompts: Prompts,
    transcripts: Sequence[Sequence[int]],
    breaks: Sequence[Collection[int]],
    ends: Sequence[float],
) -> list[list[Piece]]:
    """Return transcripts, which stay as they are, in pieces with their times.

    The model adds timestamps to the tokens that are given: greedily, by Whisper's rules for them.

    Args:
        base: A net with timestamps.
        encoded: Of `encode`.
        prompts: Without `<|notimestamps|>`.
        transcripts: Tokens of text.
        breaks: How many tokens of each transcript there may be before a timestamp inside of it.
        ends: Seconds at which the audio of each ends.
    """
    begin, end = timestamp_begin(base), int(base.net.config.eos_token_id)
    assert begin is not None
    options = _options(base, encoded, prompts)
    last = [begin + int(seconds / TIME_PRECISION) for seconds in ends]
    spell = Spell(len(prompts[0]), transcripts, breaks, begin, last, end)
    with _without_thresholds(base), quiet_transformers():
        found = base.net.generate(
            return_timestamps=True,
            return_dict_in_generate=True,
            logits_processor=[spell],
            **options,
        )
    rows = found.sequences[:, len(prompts[0]) :].tolist()
    return [
        _pieces(row, tokens, begin, seconds)
        for row, tokens, seconds in zip(rows, transcripts, ends, strict=True)
    ]


def _pieces(timed: Sequence[int], tokens: Sequence[int], begin: int, seconds: float) -> list[Piece]:
    """Return all tokens, in pieces between the timestamps among those that are `timed`."""
    pieces: list[Piece] = []
    start, taken, count = 0.0, 0, 0
    for token in timed:
        if token < begin:
            count = min(count + 1, len(tokens))  # then end tokens follow
        else:
            time = (token - begin) * TIME_PRECISION
            if count > taken:
                pieces.append(Piece(start, time, list(tokens[taken:count])))
                taken = count
            start = time
    if taken < len(tokens):  # without a timestamp after it
        if start >= seconds:  # nor time for it
            start, taken = (pieces[-1].start, taken - len(pieces[-1].tokens)) if pieces else (0, 0)
            pieces = pieces[:-1]
        pieces.append(Piece(start, seconds, list(tokens[taken:])))
    return pieces


def _options(
    base: HasNet,
    encoded: Tensor,
    prompts: Prompts,
    limits: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    is_loop: Callable[[Sequence[int]], bool] | None = None,
) -> dict[str, Any]:
    # A code-switched prompt has two language tokens, so that prompts are given as tokens; with a
    # `language` as well `generate` does not detect one first.
    settings = base.net.generation_config
    known = settings.lang_to_id if getattr(settings, "is_multilingual", False) else None
    options: dict[str, Any] = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
        "decoder_input_ids": torch.tensor([list(p) for p in prompts], device=encoded.device),
        "language": next(iter(known)) if known else None,
        "do_sample": False,
        "num_beams": 1,
        "temperature": 0.0,
        "force_unique_generate_call": True,  # this window alone
    }
    processors: list[LogitsProcessor] = [] if sampling is None else [Sample(sampling)]
    width, end = len(prompts[0]), int(base.net.config.eos_token_id)
    if limits is not None:
        processors.append(Limit(width, limits, end))
    if is_loop is not None:
        processors.append(EndLoops(width, is_loop, end))
    return options | ({"logits_processor": processors} if processors else {})


@contextmanager
def _without_thresholds(base: HasNet) -> Iterator[None]:
    """Hide a checkpoint's thresholds for falling back, for which `generate` needs features."""
    config = base.net.generation_config
    hidden = {name: vars(config).pop(name) for name in THRESHOLDS if name in vars(config)}
    try:
        yield
    finally:
        vars(config).update(hidden)


@torch.inference_mode()
def detect_languages(base: Base, encoded: Tensor) -> list[str]:
    """Return the most probable language code for each of some encoder states.

    Their shape is (batch, positions, width).
    """
    outputs = BaseModelOutput(last_hidden_state=encoded)
    with quiet_transformers():
        tokens = base.net.detect_language(encoder_outputs=outputs)
    return [name.strip("<|>") for name in base.tokenizer.convert_ids_to_tokens(tokens.tolist())]


@torch.inference_mode()
def score_tokens(
    base: Base, encoded: Tensor, prompts: Prompts, transcripts: Sequence[Sequence[int]]
) -> list[TokenScores]:
    """Return the scores of transcripts after their prompts; no token is suppressed.

    Raises:
        UserError: If the net computes NaN.
    """
    net, width = base.net, len(prompts[0])
    end = net.config.eos_token_id
    rows = [
        torch.tensor([*prompt, *tokens][: net.config.max_target_positions])
        for prompt, tokens in zip(prompts, transcripts, strict=True)
    ]
    inputs = pad_sequence(rows, batch_first=True, padding_value=end).to(net.device)
    states = net.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        decoder_input_ids=inputs,
        use_cache=False,
    ).last_hidden_state
    no_speech_id = _no_speech_id(base)
    scores = []
    for row, state, tokens in zip(rows, states, transcripts, strict=True):
        # Row by row: all logits of a batch can be more than a gigabyte.
        log_probs = net.proj_out(state[: len(row)]).float().log_softmax(-1).cpu()
        targets = torch.tensor([*tokens, end])[: len(row) - width + 1]
        chosen = log_probs[width - 1 :].gather(1, targets[:, None])[:, 0]
        no_speech = 0.0 if no_speech_id is None else log_probs[0, no_speech_id].exp().item()
        if math.isnan(mean := chosen.mean().item()):
            raise UserError(
                f"base '{base.name}', or its adapter, computes what is no number; its weights are "
                "too large, or its dtype too short: give another dtype, base or adapter"
            )
        scores.append(TokenScores(chosen[: len(tokens)], mean, no_speech))
    return scores


def _no_speech_id(base: Base) -> int | None:
    last = getattr(base.net.generation_config, "no_timestamps_token_id", None)
    if last is None or base.tokenizer.convert_ids_to_tokens(last - 1) not in NO_SPEECH:
        return None
    return last - 1
