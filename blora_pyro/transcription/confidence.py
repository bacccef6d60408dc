"""Confidence of the words of a transcript, from posterior draws.

The transcript is that of the posterior mean. For K draws theta_k of the adapter weights, and a word
w of tokens w_1 ... w_n that follows the tokens h in its window,

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
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import torch
from torch import Tensor
from transformers import WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from blora_pyro.metrics import words
from blora_pyro.metrics.normalizers import Normalizer
from blora_pyro.transcription.transcripts import Word

_TIMESTAMP = re.compile(r"<\|\d+\.\d+\|>")
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
NORMALIZER = Normalizer()


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
