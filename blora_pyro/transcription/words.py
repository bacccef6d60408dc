"""Words of a transcript: the tokens that spell them, when they are said, and how sure they are.

Times are those of the cross-attention of the alignment heads, as in OpenAI's decoder
(https://github.com/openai/whisper/blob/main/whisper/timing.py) and in faster-whisper.

Confidence is from posterior draws; the transcript is the posterior mean's. For K draws theta_k
of the adapter weights, and a word w of tokens w_1 ... w_n that follows the tokens h in its window,

    log p_k    = sum_i log p(w_i | w_<i, h, audio, theta_k)
    log_prob   = 1/K sum_k log p_k
    agreement  = share of the draws whose own greedy transcripts of the window have the word at its
                 position, aligned to the mean's with the fewest edits (ignoring case, punctuation)
    confidence = (agreement + exp(log_prob)) / 2

Agreement alone is overconfident, and exp(log_prob) alone separates correct from wrong words less
well. `experiments/confidence.py` measures their mean; a calibration map fitted to held-out data
adds little to it, so there is none.

A token that two words share, as with two Han characters, counts for both.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jiwer
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from blora_pyro.metrics import words
from blora_pyro.metrics.normalizers import Normalizer
from blora_pyro.models import Base
from blora_pyro.models.decoding import Prompts, score_tokens
from blora_pyro.transcription.transcripts import TimedWord, Word

_TIMESTAMP = re.compile(r"<\|\d+\.\d+\|>")
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
NORMALIZER = Normalizer()

SMOOTHED = 7  # frames of the attention, a median of which is taken
LONGEST_TYPICAL = 0.7  # seconds of a typical word at most
SENTENCE_ENDS = ".。!！?？"


@dataclass(frozen=True)
class Spelling:
    """A word and the indices of its tokens."""

    text: str
    tokens: list[int]


class Speller:
    """Maps tokens to the words that they spell."""

    def __init__(self, tokenizer: WhisperTokenizer) -> None:
        """Create a speller for the tokens of a tokenizer."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = tokenizer.get_added_vocab()

    def spell(self, tokens: Sequence[int], offset: int = 0) -> list[Spelling]:
        """Words of a transcript (a Han character counts as one), in order.

        Special tokens and timestamps are ignored; a space belongs to the word after it. `offset` is
        added to all token indices.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, spans = "", []
        for index, token in enumerate(tokens, offset):
            start = len(text)
            text += decoder.decode(self._bytes(token))
            unfinished = bool(decoder.getstate()[0])
            spans.append((index, start, len(text) + unfinished))
        text += decoder.decode(b"", final=True)
        found, end = [], 0
        for word in words(text):
            start, end = end, text.index(word, end) + len(word)
            indices = [i for i, first, last in spans if start < last and first < min(last, end)]
            found.append(Spelling(word, indices))
        return found

    def is_mark(self, token: int) -> bool:
        """Return whether a token spells punctuation alone."""
        text = self._bytes(token).decode("utf-8", "ignore").strip()
        return bool(text) and all(unicodedata.category(char)[0] in "PS" for char in text)

    def _bytes(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self._special or _TIMESTAMP.fullmatch(name):
            return b""
        return name.encode() if name in self._added else bytes(_BYTES[char] for char in name)


class Tally:
    """Agreement and log-probability of the words of one window's transcript, over draws."""

    def __init__(self, spelled: Sequence[Spelling]) -> None:
        """Start without draws; `spelled` is the posterior mean's transcript."""
        self.spelled = spelled
        self._draws = 0
        self._sums = torch.zeros(2, len(spelled), dtype=torch.float64)

    def add(self, log_probs: Tensor, own: Sequence[Spelling]) -> None:
        """Add a draw.

        Args:
            log_probs: Log-probabilities of the mean's transcript under the draw, (tokens,).
            own: Words of the draw's own transcript.
        """
        keys, others = (
            " ".join(word_key(word.text) for word in row) for row in (self.spelled, own)
        )
        for chunk in jiwer.process_words(keys, others).alignments[0]:
            if chunk.type == "equal":
                self._sums[0, chunk.ref_start_idx : chunk.ref_end_idx] += 1
        for index, word in enumerate(self.spelled):
            self._sums[1, index] += log_probs[word.tokens].double().sum()
        self._draws += 1

    def words(self) -> list[Word]:
        """The words with their means over all draws."""
        rows = (self._sums / self._draws).T.tolist()
        return [Word(one.text, *row) for one, row in zip(self.spelled, rows, strict=True)]


def word_key(word: str) -> str:
    """A word without case and punctuation, unless nothing would be left."""
    return re.sub("[ ']", "", NORMALIZER(word)) or word


# ---- when words are said


def time_words(
    spelled: Sequence[Spelling],
    marks: Sequence[bool],
    begins: Sequence[float],
    probabilities: Sequence[float],
) -> list[TimedWord]:
    """Return words of a window with their times; what is too long after a pause begins later.

    Punctuation has no part in its word's time and probability. A word after a sentence's end lasts
    twice a typical one at most, and so does the first: before it there may be silence. As in
    faster-whisper.

    Args:
        spelled: The words.
        marks: Of each token, whether it is punctuation alone.
        begins: When each token begins and the last one ends, seconds, (tokens + 1,).
        probabilities: Of the tokens, (tokens,).
    """
    cores = [[one for one in word.tokens if not marks[one]] or word.tokens for word in spelled]
    spans = [(begins[core[0]], begins[core[-1] + 1]) for core in cores]
    lengths = [end - start for start, end in spans if end > start]
    typical = min(median(lengths), LONGEST_TYPICAL) if lengths else 0.0
    found: list[TimedWord] = []
    before = ""
    for word, core, (start, end) in zip(spelled, cores, spans, strict=True):
        is_after = end > 4 * typical if not found else before[-1:] in SENTENCE_ENDS
        if is_after and end - start > 2 * typical:
            start = end - 2 * typical
        chosen = [probabilities[token] for token in core if token < len(probabilities)]
        found.append(TimedWord(word.text, start, end, sum(chosen) / max(1, len(chosen))))
        before = word.text
    return found


def align(
    base: Base,
    encoded: Tensor,
    prompts: Prompts,
    transcripts: Sequence[Sequence[int]],
    ends: Sequence[float],
) -> list[tuple[list[float], list[float]]]:
    """Return when tokens begin and the last one ends, and the probabilities of the tokens.

    Of each transcript seconds from the window's start, (tokens + 1,), and (tokens,).

    Args:
        base: The net, adapted or not.
        encoded: Of `decoding.encode`.
        prompts: Of all transcripts, of one length, with `<|notimestamps|>`.
        transcripts: Tokens of text, without timestamps.
        ends: Seconds at which the audio of each ends.
    """
    heads, kept = _alignment_heads(base), dict[tuple[int, str], Tensor]()
    config, layers = base.net.config, base.net.model.decoder.layers

    def keep(key: tuple[int, str], layer: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[key] = output.float()

    with ExitStack() as hooks:
        for number in {number for number, _ in heads}:
            for name in ("q_proj", "k_proj"):
                layer = getattr(layers[number].encoder_attn, name)
                hook = layer.register_forward_hook(partial(keep, (number, name)))
                hooks.callback(hook.remove)
        scores = score_tokens(base, encoded, prompts, transcripts)
    width = config.d_model // config.decoder_attention_heads
    seconds = base.feature_extractor.chunk_length / config.max_source_positions  # of a frame
    found = []
    for row, (tokens, end, score) in enumerate(zip(transcripts, ends, scores, strict=True)):
        count, frames = len(prompts[row]) + len(tokens), max(1, round(end / seconds))
        weights = []
        for number, head in heads:
            part = slice(head * width, (head + 1) * width)
            query = kept[number, "q_proj"][row, :count, part] * width**-0.5
            key = kept[number, "k_proj"][row, :frames, part]
            weights.append((query @ key.T).softmax(-1))
        begins = _path(_sharpened(torch.stack(weights))[len(prompts[row]) - 1 :])
        times = [seconds * frame for frame in begins]
        times += [end] * (len(tokens) + 1 - len(times))  # what the decoder had no room for
        found.append((times, score.log_probs.exp().tolist()))
    return found


def _alignment_heads(base: Base) -> list[tuple[int, int]]:
    """Return (layer, head) of the checkpoint; else all of the last half of layers, as OpenAI."""
    if known := getattr(base.net.generation_config, "alignment_heads", None):
        return [(int(layer), int(head)) for layer, head in known]
    config = base.net.config
    layers = range(config.decoder_layers // 2, config.decoder_layers)
    return [(layer, head) for layer in layers for head in range(config.decoder_attention_heads)]


def _sharpened(weights: Tensor) -> Tensor:
    """Return attention, (heads, tokens, frames), as (tokens, frames): what stands out, smoothed."""
    spread, mean = torch.std_mean(weights, -2, correction=0, keepdim=True)
    weights = (weights - mean) / spread.clamp_min(1e-9)
    side = SMOOTHED // 2
    if weights.shape[-1] > side:
        padded = functional.pad(weights, (side, side), mode="reflect")
        weights = padded.unfold(-1, SMOOTHED, 1).median(-1).values
    return weights.mean(0).cpu()


def _path(gain: Tensor) -> list[int]:
    """Return the frame at which the path of the greatest sum enters each row of (tokens, frames).

    It leads from the first token and frame to the last ones: a token on, a frame on, or both.
    """
    cost = -gain.double().numpy()
    total = np.empty_like(cost)
    above = np.full(cost.shape[1] + 1, np.inf)  # the row above, and before its first frame
    above[0] = 0.0
    for number, row in enumerate(cost):
        entered, sums = np.minimum(above[:-1], above[1:]), np.cumsum(row)
        total[number] = sums + np.minimum.accumulate(entered - (sums - row))
        above = np.concatenate([[np.inf], total[number]])
    token, frame = cost.shape[0] - 1, cost.shape[1] - 1
    begins = [0] * cost.shape[0]
    while token > 0:
        begins[token] = frame
        up = total[token - 1, frame]
        both = total[token - 1, frame - 1] if frame else np.inf
        back = total[token, frame - 1] if frame else np.inf
        if both < min(up, back):
            token, frame = token - 1, frame - 1
        elif up < min(both, back):
            token -= 1
        else:
            frame -= 1
    return begins
