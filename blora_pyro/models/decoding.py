"""A window of audio to tokens, by transformers' own `generate`; and how probable tokens are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro.data import trim
from blora_pyro.models import encoder
from blora_pyro.models.base import Base

TIME_PRECISION = 0.02  # seconds between two timestamp tokens
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # two names of one token, below <|notimestamps|>
THRESHOLDS = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")

Prompts = Sequence[Sequence[int]]  # of one length


@dataclass(frozen=True)
class Piece:
    """What was said between two timestamps.

    Attributes:
        start: Seconds from the window's start.
        end: Likewise.
        tokens: Those of the text, and the timestamps around them.
    """

    start: float
    end: float
    tokens: list[int]


@dataclass(frozen=True)
class Scores:
    """How probable a transcript is: nats.

    Attributes:
        log_probs: Of each token after the prompt and before it, (tokens,).
        mean: Per token, the end token among them, as OpenAI's `avg_logprob`.
        no_speech: Probability that there is no speech; 0 where the model has no token for that.
    """

    log_probs: Tensor
    mean: float
    no_speech: float


def timestamp_begin(base: Base) -> int | None:
    """Id of the first timestamp token; None if the model has none for every place in its window."""
    last = getattr(base.net.generation_config, "no_timestamps_token_id", None)
    if last is None:
        return None
    needed = round(base.feature_extractor.chunk_length / TIME_PRECISION) + 1
    return last + 1 if base.net.config.vocab_size > last + needed else None


@torch.inference_mode()
def encode(base: Base, features: Tensor) -> Tensor:
    """The encoder's states, (batch, positions, width), of log-mels (batch, mels, frames)."""
    heard = trim(features) if base.trim_audio else features
    return encoder.encode(base.net, heard.to(base.net.device))


@torch.inference_mode()
def decode(base: Base, encoded: Tensor, prompts: Prompts) -> list[list[int]]:
    """Greedy transcripts, as tokens without the end token, after the prompts."""
    with _plain(base):
        said = base.net.generate(return_timestamps=False, **_options(base, encoded, prompts))
    end = base.net.config.eos_token_id  # and what the batch is padded with
    rows = said[:, len(prompts[0]) :].tolist()
    return [[token for token in row if token != end] for row in rows]


@torch.inference_mode()
def decode_timed(
    base: Base, encoded: Tensor, prompts: Prompts, temperature: float = 0.0
) -> list[list[Piece]]:
    """Transcripts in pieces with their times, after prompts without `<|notimestamps|>`.

    What follows the last pair of timestamps, unfinished as it is, is left out.
    """
    with _plain(base):
        said = base.net.generate(
            return_timestamps=True,
            return_segments=True,
            temperature=temperature,
            **_options(base, encoded, prompts),
        )
    return [
        [Piece(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in row]
        for row in said["segments"]
    ]


def _options(base: Base, encoded: Tensor, prompts: Prompts) -> dict[str, Any]:
    # The prompt is given whole, as a code-switched one has two language tokens; naming a language
    # as well keeps `generate` from detecting one first.
    settings = base.net.generation_config
    known = settings.lang_to_id if getattr(settings, "is_multilingual", False) else None
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
        "decoder_input_ids": torch.tensor([list(p) for p in prompts], device=encoded.device),
        "language": next(iter(known)) if known else None,
        "do_sample": False,
        "num_beams": 1,
        "force_unique_generate_call": True,  # this window, and not the next
    }


@contextmanager
def _plain(base: Base) -> Iterator[None]:
    """Without a checkpoint's own thresholds: `generate` falls back with features alone."""
    config = base.net.generation_config
    own = {name: getattr(config, name) for name in THRESHOLDS if hasattr(config, name)}
    try:
        for name in own:
            delattr(config, name)
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


@torch.inference_mode()
def detect_languages(base: Base, encoded: Tensor) -> list[str]:
    """Most probable language code of each of the encoder's states (batch, positions, width)."""
    outputs = BaseModelOutput(last_hidden_state=encoded)
    tokens = base.net.detect_language(encoder_outputs=outputs)
    return [name.strip("<|>") for name in base.tokenizer.convert_ids_to_tokens(tokens.tolist())]


@torch.inference_mode()
def score_tokens(
    base: Base, encoded: Tensor, prompts: Prompts, said: Sequence[Sequence[int]]
) -> list[Scores]:
    """How probable the tokens `said` after the prompts are, under the model without suppression."""
    net, width = base.net, len(prompts[0])
    end = net.config.eos_token_id
    rows = [
        torch.tensor([*prompt, *tokens][: net.config.max_target_positions])
        for prompt, tokens in zip(prompts, said, strict=True)
    ]
    inputs = pad_sequence(rows, batch_first=True, padding_value=end).to(net.device)
    states = net.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        decoder_input_ids=inputs,
        use_cache=False,
    ).last_hidden_state
    silence = _no_speech_id(base)
    scores = []
    for row, state, tokens in zip(rows, states, said, strict=True):
        # Row by row: all logits of a batch can be more than a gigabyte.
        log_probs = net.proj_out(state[: len(row)]).float().log_softmax(-1).cpu()
        targets = torch.tensor([*tokens, end])[: len(row) - width + 1]
        chosen = log_probs[width - 1 :].gather(1, targets[:, None])[:, 0]
        no_speech = 0.0 if silence is None else log_probs[0, silence].exp().item()
        scores.append(Scores(chosen[: len(tokens)], chosen.mean().item(), no_speech))
    return scores


def _no_speech_id(base: Base) -> int | None:
    last = getattr(base.net.generation_config, "no_timestamps_token_id", None)
    if last is None or base.tokenizer.convert_ids_to_tokens(last - 1) not in NO_SPEECH:
        return None
    return last - 1
