"""How sure a posterior is of the words of a transcript.

The transcript is that of the posterior mean. For K draws theta_k of the adapter's weights, and a
word w of tokens w_1 ... w_n that follows the tokens h in its window,

    log p_k    = sum_i log p(w_i | w_<i, h, audio, theta_k)
    log_prob   = 1/K sum_k log p_k
    agreement  = share of the draws whose own greedy transcripts of the window have the word at its
                 place, aligned to the mean's with the fewest edits (case and punctuation aside)
    confidence = (agreement + exp(log_prob)) / 2

The first half alone is too sure, the second alone tells right words from wrong ones less well.
`benchmarks/confidence.py` measures what their mean is worth, and that a map fitted to held-out data
adds little to it: there is none.

A token that two words share, as two Han characters may, counts for both.
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
BASIC = Normalizer("basic")


@dataclass(frozen=True)
class Spelling:
    """A word and the places of its tokens."""

    text: str
    tokens: list[int]


class Speller:
    """Tells which tokens spell which word."""

    def __init__(self, tokenizer: WhisperTokenizer) -> None:
        """For the tokens of a tokenizer."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = tokenizer.get_added_vocab()
        self._contents: dict[int, bytes] = {}

    def spell(self, tokens: Sequence[int], offset: int = 0) -> list[Spelling]:
        """Words of a transcript (a Han character is one), in order.

        Special tokens and timestamps spell nothing; a space belongs to the word after it.

        Args:
            tokens: Of the transcript.
            offset: Added to the places of all tokens.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, spans = "", []
        for place, token in enumerate(tokens, offset):
            start = len(text)
            text += decoder.decode(self._content(token))
            unfinished = bool(decoder.getstate()[0])
            spans.append((place, start, len(text) + unfinished))
        text += decoder.decode(b"", final=True)
        found, end = [], 0
        for word in words(text):
            start, end = end, text.index(word, end) + len(word)
            places = [i for i, first, last in spans if start < last and first < min(last, end)]
            found.append(Spelling(word, places))
        return found

    def _content(self, token: int) -> bytes:
        """The bytes that a token writes."""
        if token not in self._contents:
            name = self._tokenizer.convert_ids_to_tokens(token)
            content = b""
            if name in self._added and token not in self._special:
                content = b"" if _TIMESTAMP.fullmatch(name) else name.encode()
            elif name is not None and token not in self._special:
                content = bytes(_BYTES[char] for char in name)
            self._contents[token] = content
        return self._contents[token]


class Tally:
    """What the draws make of the words of one window's transcript."""

    def __init__(self, spelled: Sequence[Spelling]) -> None:
        """No draw yet.

        Args:
            spelled: The words of the posterior mean's transcript.
        """
        self.spelled = spelled
        self._draws = 0
        self._sums = torch.zeros(2, len(spelled), dtype=torch.float64)

    def add(self, log_probs: Tensor, said: Sequence[Spelling]) -> None:
        """Count a draw.

        Args:
            log_probs: Of the tokens of the mean's transcript, (tokens,), under the draw.
            said: The words of the draw's own transcript.
        """
        log_prob = [log_probs[word.tokens].double().sum().item() for word in self.spelled]
        self._sums += torch.tensor([self._agreement(said), log_prob], dtype=torch.float64)
        self._draws += 1

    def _agreement(self, said: Sequence[Spelling]) -> list[float]:
        """1 for every word that `said` has at its place, 0 for the others."""
        agreed = [0.0] * len(self.spelled)
        keys, others = (
            " ".join(word_key(word.text) for word in row) for row in (self.spelled, said)
        )
        for chunk in jiwer.process_words(keys, others).alignments[0]:
            if chunk.type == "equal":
                for place in range(chunk.ref_start_idx, chunk.ref_end_idx):
                    agreed[place] = 1.0
        return agreed

    def words(self) -> list[Word]:
        """The words with the means over all draws."""
        rows = (self._sums / self._draws).T.tolist()
        return [Word(one.text, *row) for one, row in zip(self.spelled, rows, strict=True)]


def word_key(word: str) -> str:
    """A word as it is compared: without case and punctuation, if anything is left then."""
    return BASIC(word).replace(" ", "") or word
