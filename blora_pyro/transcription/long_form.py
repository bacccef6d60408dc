"""Decoding of recordings of any length, window by window, batched across recordings.

A recording that fits the model's window is decoded at once, as in evaluation, and a model with
timestamp tokens then says when its parts were spoken. A longer one takes several windows: with such
a model each begins where the last complete segment ended, as in OpenAI's decoder; otherwise the
audio is cut at its pauses.

transformers' own long-form `generate` is not used, because its prompt has room for one language and
code-switched speech has two. Here every window is a call of `generate` with its whole prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import torch
from torch import Tensor

from blora_pyro.data import featurise, prompt_ids
from blora_pyro.languages import join_texts
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    detect_languages,
    encode,
    text_of,
    time_pieces,
    timestamp_begin,
)
from blora_pyro.transcription.safeguards import decode_safely, hearings
from blora_pyro.transcription.windows import Recording, Span, Window, batched
from blora_pyro.transcription.words import Speller, align, time_words

BATCHES_IN_MEMORY = 8  # recordings are read, and windows kept, for so many batches at a time

ENGLISH = "en"


@dataclass
class LongFormDecoder:
    """Decodes recordings together; for the attributes see `Transcriber`."""

    base: Base
    language: str | None = None
    task: str = "transcribe"
    batch_size: int = 16
    seed: int = 0
    word_timestamps: bool = False

    def decode(self, recordings: Sequence[Recording]) -> Iterator[list[Window]]:
        """Yield windows with their transcripts, those of a recording in order.

        Raises:
            UserError: If the tokenizer lacks the language or the task, or a recording's file can't
                be read.
        """
        begin = timestamp_begin(self.base)
        length: float = self.base.feature_extractor.chunk_length
        timed = [begin is not None and one.duration > length for one in recordings]
        todo = [
            one.span_from(0, length) if by_time else one.fixed_spans(length)
            for one, by_time in zip(recordings, timed, strict=True)
        ]
        known: dict[int, tuple[str, list[int]]] = {}  # language and prompt, by recording
        if code := self._given_language:
            known = {i: (code, self._prompt_of(code, by_time)) for i, by_time in enumerate(timed)}
        while any(todo):
            # Of a recording whose language is yet to be detected one window comes alone.
            one_at_most = [
                0 if not row else len(row) if i in known else 1 for i, row in enumerate(todo)
            ]
            spans: list[tuple[int, Span]] = []
            for i, count in enumerate(one_at_most):
                taken = min(count, max(1, BATCHES_IN_MEMORY * self.batch_size - len(spans)))
                spans += [(i, span) for span in todo[i][:taken]]
                todo[i] = todo[i][taken:]
            waves = ((recordings[i].name, recordings[i].wave[slice(*span)]) for i, span in spans)
            features = featurise(waves, self.base.feature_extractor)
            windows = [
                Window(i, span, mels, timed[i], *known.get(i, ()))
                for (i, span), mels in zip(spans, features, strict=True)
            ]
            self._decode(windows)
            for window in windows:
                if window.prompt:
                    known.setdefault(window.recording, (window.language, window.prompt))
                if window.timed:
                    recording, first = recordings[window.recording], window.next_sample(begin or 0)
                    todo[window.recording] = recording.span_from(first, length)
            yield windows

    def _decode(self, windows: Sequence[Window]) -> None:
        """Fill in language, prompt and pieces; a window in which nothing can be heard has none."""
        heard = hearings(self.base, torch.stack([one.features for one in windows]), self.seed)
        by_window = {
            one: hearing
            for one, hearing in zip(windows, heard, strict=True)
            if not hearing.is_silent
        }
        for batch, features in batched(list(by_window), self.batch_size, lambda one: one.seconds):
            encoded = encode(self.base, features)
            self._detect(batch, encoded)
            prompts = [one.prompt for one in batch]
            ends = [one.seconds for one in batch] if batch[0].timed else None
            hearing = [by_window[one] for one in batch]
            rows = decode_safely(self.base, encoded, prompts, hearing, ends)
            for one, pieces in zip(batch, rows, strict=True):
                one.pieces = pieces
            if ends is None and timestamp_begin(self.base) is not None:
                self._time(batch, encoded)
            if self.word_timestamps:
                self._time_words(batch, encoded)

    @property
    def _given_language(self) -> str | None:
        """The language of all recordings; None if it is to be detected."""
        multilingual = getattr(self.base.net.generation_config, "is_multilingual", False)
        return self.language or (None if multilingual else ENGLISH)

    def _prompt_of(self, language: str, timed: bool) -> list[int]:
        prompt = prompt_ids(self.base.tokenizer, language, self.task, self.base.language_map)
        return prompt[:-1] if timed else prompt

    def _detect(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Give windows without a prompt one in the language that they are in."""
        codes = detect_languages(self.base, encoded) if not all(w.prompt for w in batch) else []
        for window, code in zip(batch, codes, strict=False):
            if not window.prompt:
                window.language, window.prompt = code, self._prompt_of(code, window.timed)

    def _time(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Divide what was decoded without timestamps into pieces with their times."""
        begin = timestamp_begin(self.base)
        said = {
            row: [token for token in window.tokens if begin is None or token < begin]
            for row, window in enumerate(batch)
            if text_of(self.base, window.tokens)
        }
        if not said:
            return
        prompts = [batch[row].prompt[:-1] for row in said]
        breaks = [self._breaks(tokens) for tokens in said.values()]
        ends = [batch[row].seconds for row in said]
        states, tokens = encoded[list(said)], list(said.values())
        rows = time_pieces(self.base, states, prompts, tokens, breaks, ends)
        for row, pieces in zip(said, rows, strict=True):
            batch[row].pieces = pieces

    def _time_words(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Find when each word is said."""
        begin, speller = timestamp_begin(self.base), Speller(self.base.tokenizer)
        texts = [
            [
                [token for token in piece.tokens if begin is None or token < begin]
                for piece in one.pieces
            ]
            for one in batch
        ]
        said = {row: [*chain(*pieces)] for row, pieces in enumerate(texts) if any(pieces)}
        if not said:
            return
        without = [begin - 1] if begin is not None and batch[0].timed else []
        prompts = [[*batch[row].prompt, *without] for row in said]
        ends = [batch[row].seconds for row in said]
        found = align(self.base, encoded[[*said]], prompts, [*said.values()], ends)
        for (row, tokens), (begins, probabilities) in zip(said.items(), found, strict=True):
            starts = accumulate(map(len, texts[row]), initial=0)
            pieces = [
                speller.spell(piece, start)
                for piece, start in zip(texts[row], starts, strict=False)
            ]
            marks = [speller.is_mark(token) for token in tokens]
            rest = iter(time_words([*chain(*pieces)], marks, begins, probabilities))
            batch[row].times = [[*islice(rest, len(piece))] for piece in pieces]

    def _breaks(self, tokens: Sequence[int]) -> list[int]:
        """Return after how many tokens a text can be cut so that its parts joined are the text."""
        whole = text_of(self.base, tokens)
        return [
            place
            for place in range(1, len(tokens))
            if join_texts([text_of(self.base, tokens[:place]), text_of(self.base, tokens[place:])])
            == whole
        ]
