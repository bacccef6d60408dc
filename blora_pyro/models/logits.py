"""What `generate` is to do with the logits of a batch, each row by itself, and what it may say."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
LEAST = -1e9  # a logit below all others but infinite ones
LOOK = 8  # tokens from one look for loops to the next
TURNS = 4
TURNING = 24


@dataclass(frozen=True)
class Sampling:
    """Draw tokens in place of the most probable ones.

    Attributes:
        temperature: Above 0; the logits are divided by it.
        seeds: One for each transcript, whose tokens depend on nothing else that is random: neither
            on its batch nor on what was drawn before.
    """

    temperature: float
    seeds: Sequence[int]


class Limit(LogitsProcessor):
    """Ends every transcript that has reached its number of tokens."""

    def __init__(self, prompt: int, limits: Sequence[int], end: int) -> None:
        """Take the length of the prompts, the most tokens of every row, and the end token."""
        self.prompt, self.limits, self.end = prompt, torch.tensor(limits), end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits, (batch, vocabulary): of a row that is full the end token alone."""
        is_full = self.limits <= input_ids.shape[1] - self.prompt
        if is_full.any():
            scores = scores.masked_fill(is_full[:, None].to(scores.device), -math.inf)
            scores[is_full, self.end] = 0.0
        return scores


class EndLoops(LogitsProcessor):
    """Ends every transcript that repeats its last tokens: greedy decoding does so to its limit."""

    def __init__(self, prompt: int, is_loop: Callable[[Sequence[int]], bool], end: int) -> None:
        """Take the length of the prompts, what tells that a text is a loop, and the end token."""
        self.prompt, self.is_loop, self.end = prompt, is_loop, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits, (batch, vocabulary): of a row that is in a loop the end token alone."""
        if (input_ids.shape[1] - self.prompt) % LOOK:
            return scores
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            if tokens and tokens[-1] != self.end and repeats(tokens) and self.is_loop(tokens):
                scores = scores.clone()
                scores[row] = -math.inf
                scores[row, self.end] = 0.0
        return scores


def repeats(tokens: Sequence[int]) -> bool:
    """Return whether tokens end in `TURNS` turns of the same, of `TURNING` tokens at least."""
    for period in range(1, len(tokens) // TURNS + 1):
        count = max(TURNS * period, TURNING)
        last = tokens[-count:]
        if len(last) == count and last[period:] == last[:-period]:
            return True
    return False


class Sample(LogitsProcessor):
    """Adds Gumbel noise, so that the most probable token is a draw, and each row has its own.

    The largest sum of log-probability and Gumbel noise is at a draw (Maddison et al., A* Sampling,
    arXiv 1411.0030); transformers draws all rows of a batch from one generator.
    """

    def __init__(self, sampling: Sampling) -> None:
        """Seed a generator for every row."""
        self.temperature = sampling.temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in sampling.seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return tempered logits with noise, (batch, vocabulary)."""
        waits = [
            torch.empty(scores.shape[1]).exponential_(generator=generator)
            for generator in self.generators
        ]
        return scores / self.temperature - torch.stack(waits).log().to(scores.device)


class Spell(LogitsProcessor):
    """Leaves the next token that is given, or a timestamp where there may be a break."""

    def __init__(
        self,
        prompt: int,
        transcripts: Sequence[Sequence[int]],
        breaks: Sequence[Collection[int]],
        begin: int,
        last: Sequence[int],
        end: int,
    ) -> None:
        """Take what `decoding.time_pieces` knows of every row.

        Args:
            prompt: Length of the prompts.
            transcripts: Tokens that are given.
            breaks: How many of them there may be before a timestamp.
            begin: The first timestamp.
            last: The last timestamp that each may have.
            end: The end token.
        """
        self.prompt, self.begin, self.last = prompt, begin, last
        self.rows = [[*tokens, end] for tokens in transcripts]
        self.breaks = [
            {0, len(row), *places} for row, places in zip(transcripts, breaks, strict=True)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits, (batch, vocabulary), of what may come next."""
        spelled = (input_ids[:, self.prompt :] < self.begin).sum(1).tolist()
        kept = torch.full_like(scores, -math.inf)
        for row, (count, tokens) in enumerate(zip(spelled, self.rows, strict=True)):
            place = min(count, len(tokens) - 1)  # a row that has ended is filled with end tokens
            if place in self.breaks[row]:
                times = slice(self.begin, self.last[row] + 1)
                kept[row, times] = scores[row, times]
            # Where a timestamp is a must the token is suppressed, and every timestamp goes before.
            token = tokens[place]
            kept[row, token] = scores[row, token].clamp(min=LEAST)
        return kept


def allow(net: nn.Module, tokens: Iterable[int]) -> None:
    """Have `generate` say tokens that the net's generation config suppresses."""
    settings, lifted = getattr(net, "generation_config", None), {*tokens}
    for name in SUPPRESSED if lifted else ():
        kept = [token for token in getattr(settings, name, None) or () if token not in lifted]
        setattr(settings, name, kept or None)


@contextmanager
def allowing(net: nn.Module, tokens: Iterable[int]) -> Iterator[None]:
    """`allow` tokens inside a `with`."""
    settings = getattr(net, "generation_config", None)
    before = {name: getattr(settings, name, None) for name in SUPPRESSED}
    allow(net, tokens)
    try:
        yield
    finally:
        for name, value in before.items() if settings is not None else ():
            setattr(settings, name, value)
