"""What a Whisper says to recordings of any length, window by window, batched across recordings.

A recording no longer than the model's window is one window, heard as in evaluation. A longer one is
heard in several: with a model that has timestamp tokens each begins where the last segment that was
finished ended, as in OpenAI's decoder; without, the audio is cut at its pauses.

transformers' own long-form `generate` is not used for that, as its prompt has room for one language
and code-switched speech has two. Here every window is a call of `generate` with its whole prompt.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from blora_pyro.data import featurise, prompt_ids
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    Piece,
    Scores,
    decode,
    decode_timed,
    detect_languages,
    encode,
    score_tokens,
    timestamp_begin,
)
from blora_pyro.transcription.windows import Recording, Span, Window, batched

# What OpenAI's decoder does with a window that went astray: it is drawn anew at the next
# temperature while it is too repetitive or too unlikely, and dropped if it rather is silence.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REPETITIVE = 2.4  # times that zlib compresses the text
UNLIKELY = -1.0  # nats a token
SILENT = 0.6  # probability of no speech

ENGLISH = "en"


def text_of(base: Base, tokens: Sequence[int]) -> str:
    """The text of tokens, without timestamps and special tokens."""
    begin = timestamp_begin(base)
    kept = [token for token in tokens if begin is None or token < begin]
    return base.tokenizer.decode(kept, skip_special_tokens=True).strip()


class Hearing:
    """Recordings that are heard together."""

    def __init__(
        self,
        base: Base,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        batch_size: int = 16,
    ) -> None:
        """How recordings are heard; see `Transcriber`."""
        self.base = base
        self.language = language
        self.task = task
        self.timestamps = timestamps
        self.batch_size = batch_size
        self.begin = timestamp_begin(base)
        self.length: float = base.feature_extractor.chunk_length
        self._prompt_ids = lru_cache(lambda code: prompt_ids(base.tokenizer, code, task))

    def hear(self, recordings: Sequence[Recording]) -> list[list[Window]]:
        """The windows of every recording, in order, each with what the model says to it.

        Raises:
            UserError: If the tokenizer does not know the language or the task.
        """
        timed = [self._timed(recording) for recording in recordings]
        todo = [
            one.span_from(0, self.length) if by_time else one.fixed_spans(self.length)
            for one, by_time in zip(recordings, timed, strict=True)
        ]
        heard: list[list[Window]] = [[] for _ in recordings]
        while any(todo):
            # A recording's first window, which tells its language, goes before the others.
            now = [row[: None if heard[i] else 1] for i, row in enumerate(todo)]
            todo = [row[len(taken) :] for row, taken in zip(todo, now, strict=True)]
            spans = [(i, span) for i, row in enumerate(now) for span in row]
            windows = self._windows(recordings, spans, timed)
            for window in windows:
                if before := heard[window.recording]:
                    window.language, window.prompt = before[0].language, before[0].prompt
            self._say(windows)
            for window in windows:
                heard[window.recording].append(window)
                if window.timed:
                    first = window.next_sample(self.begin or 0)
                    todo[window.recording] = recordings[window.recording].span_from(
                        first, self.length
                    )
        return heard

    def _timed(self, recording: Recording) -> bool:
        return self.begin is not None and (self.timestamps or recording.duration > self.length)

    def _windows(
        self, recordings: Sequence[Recording], spans: Sequence[tuple[int, Span]], timed: list[bool]
    ) -> list[Window]:
        waves = ((recordings[i].name, recordings[i].wave[slice(*span)]) for i, span in spans)
        features = featurise(waves, self.base.feature_extractor)
        return [
            Window(i, span, mels, timed[i]) for (i, span), mels in zip(spans, features, strict=True)
        ]

    def _say(self, windows: Sequence[Window]) -> None:
        """Fill in language, prompt and pieces."""
        for batch, features in batched(windows, self.batch_size, lambda window: window.seconds):
            encoded = encode(self.base, features)
            self._prompt(batch, encoded)
            if batch[0].timed:
                self._say_timed(batch, encoded)
                continue
            said = decode(self.base, encoded, [window.prompt for window in batch])
            for window, tokens in zip(batch, said, strict=True):
                window.pieces = [Piece(0.0, window.seconds, tokens)]

    def _prompt(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Give a prompt to windows that have none, in the language detected if none is given."""
        codes = [self.language or ENGLISH] * len(batch)
        multilingual = getattr(self.base.net.generation_config, "is_multilingual", False)
        if not self.language and multilingual and not all(window.prompt for window in batch):
            codes = detect_languages(self.base, encoded)
        for window, code in zip(batch, codes, strict=True):
            if not window.prompt:
                prompt = self._prompt_ids(code)
                window.language = code
                window.prompt = prompt[:-1] if window.timed else prompt

    def _say_timed(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Fill in pieces with their times, at the lowest temperature that does not go astray."""
        astray = list(range(len(batch)))
        for temperature in TEMPERATURES:
            prompts, states = [batch[i].prompt for i in astray], encoded[astray]
            said = decode_timed(self.base, states, prompts, temperature)
            for i, pieces in zip(astray, said, strict=True):  # nothing is said after the audio
                batch[i].pieces = [one for one in pieces if one.start < batch[i].seconds]
            scores = score_tokens(self.base, states, prompts, [batch[i].tokens for i in astray])
            pairs = [(i, one) for i, one in zip(astray, scores, strict=True)]
            for i, one in pairs:
                if one.mean < UNLIKELY and one.no_speech > SILENT:
                    batch[i].pieces = []
            astray = [i for i, one in pairs if batch[i].pieces and self._is_astray(batch[i], one)]
            if not astray:
                return

    def _is_astray(self, window: Window, scores: Scores) -> bool:
        text = text_of(self.base, window.tokens).encode()
        return scores.mean < UNLIKELY or len(text) > REPETITIVE * len(zlib.compress(text))
