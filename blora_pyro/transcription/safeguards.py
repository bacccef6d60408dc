"""Whisper's safeguards against loops and inventions, the same for every transcript.

A window that is too repetitive or too unlikely is drawn again at the next temperature, and is empty
if it is probably silence, as in OpenAI's decoder. Where no temperature is accepted the likeliest
text that does not repeat itself stands, as in faster-whisper.

transformers has a fallback, too, but it takes no encoder states, measures how compressible token
ids are, and draws all windows of a batch from one generator, so that a text depends on its batch.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blora_pyro.data import sounding_frames
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    Piece,
    Prompts,
    decode,
    decode_timed,
    score_tokens,
    text_of,
)
from blora_pyro.models.logits import Sampling
from blora_pyro.transcription.transcripts import SILENCE

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_COMPRESSION = 2.4  # zlib ratio of the text
MIN_LOG_PROB = -1.0  # nats per token
MAX_NO_SPEECH = 0.6  # probability of no speech

TOKENS_PER_SECOND = 40  # more than is spoken, in scripts that take three tokens a letter, too
SPARE_TOKENS = 32  # for timestamps, and what is hardly a second long


def is_loop(text: str) -> bool:
    """Return whether a text repeats itself, by the ratio of OpenAI's decoder."""
    return len(text.encode()) > MAX_COMPRESSION * len(zlib.compress(text.encode()))


@dataclass(frozen=True)
class Hearing:
    """What is known of a window before it is decoded.

    Attributes:
        is_silent: Nothing in it can be heard; its transcript is empty.
        limit: The most tokens that what sounds in it can have.
        seed: Of the tokens drawn for it; depends on its sound alone.
    """

    is_silent: bool
    limit: int
    seed: int


def hearings(base: Base, features: Tensor, seed: int = 0) -> list[Hearing]:
    """Return what is known of windows by their log-mels, (batch, mels, frames)."""
    per_second = base.feature_extractor.nb_max_frames / base.feature_extractor.chunk_length
    seconds = (sounding_frames(features) / per_second).tolist()
    loudest = features.amax((1, 2)).tolist()
    return [
        Hearing(
            is_silent=loud <= SILENCE,
            limit=SPARE_TOKENS + int(TOKENS_PER_SECOND * sounds),
            seed=zlib.crc32(row.half().cpu().numpy().tobytes(), seed),
        )
        for row, loud, sounds in zip(features, loudest, seconds, strict=True)
    ]


@dataclass(frozen=True)
class _Attempt:
    pieces: list[Piece]
    log_prob: float
    is_loop: bool


def decode_safely(
    base: Base,
    encoded: Tensor,
    prompts: Prompts,
    heard: Sequence[Hearing],
    ends: Sequence[float] | None = None,
) -> list[list[Piece]]:
    """Return the pieces of windows; none of one that is probably silence.

    Args:
        base: The net, adapted or not.
        encoded: Of `decoding.encode`.
        prompts: Of all windows, of one length.
        heard: Of each window.
        ends: Seconds at which each ends, if the prompts ask for timestamps; without timestamps a
            window is one piece.
    """

    def loops(said: Sequence[int]) -> bool:
        return is_loop(text_of(base, said))

    attempts: list[list[_Attempt]] = [[] for _ in heard]
    accepted: dict[int, list[Piece]] = {}
    for temperature in TEMPERATURES:
        if not (todo := [row for row in range(len(heard)) if row not in accepted]):
            break
        sampling = None
        if temperature:
            seeds = [heard[row].seed * 16 + round(10 * temperature) for row in todo]
            sampling = Sampling(temperature, seeds)
        states, some = encoded[todo], [prompts[row] for row in todo]
        limits = [heard[row].limit for row in todo]
        if ends is None:
            # A loop is refused in any case, and would hold up its batch to the limit.
            whole = decode(base, states, some, limits, sampling, loops)
            found = [[Piece(0.0, base.feature_extractor.chunk_length, one)] for one in whole]
        else:
            timed = decode_timed(base, states, some, limits, sampling)
            found = [  # no piece starts after the audio
                [one for one in pieces if one.start < ends[row]]
                for row, pieces in zip(todo, timed, strict=True)
            ]
        tokens = [[token for piece in pieces for token in piece.tokens] for pieces in found]
        scores = score_tokens(base, states, some, tokens)
        for row, pieces, said, one in zip(todo, found, tokens, scores, strict=True):
            text, is_unlikely = text_of(base, said), one.mean < MIN_LOG_PROB
            attempts[row].append(_Attempt(pieces, one.mean, is_loop(text)))
            if is_unlikely and one.no_speech > MAX_NO_SPEECH:
                accepted[row] = []
            elif not text or not (is_unlikely or is_loop(text)):
                accepted[row] = pieces
    return [
        accepted[row] if row in accepted else _best(attempts[row]).pieces
        for row in range(len(heard))
    ]


def _best(attempts: Sequence[_Attempt]) -> _Attempt:
    return max(attempts, key=lambda one: (not one.is_loop, one.log_prob))
