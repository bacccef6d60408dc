"""Decoding of recordings of any length, window by window, batched across recordings.

A recording that fits the model's window is decoded at once, as in evaluation. A longer one takes
several windows: with a model that has timestamp tokens each begins where the last complete segment
ended, as in OpenAI's decoder; otherwise the audio is cut at its pauses.

transformers' own long-form `generate` is not used, because its prompt has room for one language and
code-switched speech has two. Here every window is a call of `generate` with its whole prompt.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blora_pyro.data import featurise, prompt_ids
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    Piece,
    decode,
    decode_timed,
    detect_languages,
    encode,
    score_tokens,
    timestamp_begin,
)
from blora_pyro.transcription.windows import Recording, Window, batched

# OpenAI's temperature fallback: a window whose transcript is too repetitive or too unlikely is
# sampled again at the next temperature, and dropped if it is probably silence.
DECODING_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_COMPRESSION = 2.4  # zlib ratio of the text
MIN_LOG_PROB = -1.0  # nats per token
MAX_NO_SPEECH = 0.6  # probability of no speech

ENGLISH = "en"


def text_of(base: Base, tokens: Sequence[int]) -> str:
    """The text of tokens, without timestamps and special tokens."""
    begin = timestamp_begin(base)
    kept = [token for token in tokens if begin is None or token < begin]
    return base.tokenizer.decode(kept, skip_special_tokens=True).strip()


@dataclass
class LongFormDecoder:
    """Decodes recordings together; for the attributes see `Transcriber`."""

    base: Base
    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False
    batch_size: int = 16

    def decode(self, recordings: Sequence[Recording]) -> list[list[Window]]:
        """The windows of every recording, in order, with their transcripts.

        Raises:
            UserError: If the tokenizer lacks the language or the task.
        """
        begin = timestamp_begin(self.base)
        length: float = self.base.feature_extractor.chunk_length
        timed = [
            begin is not None and (self.timestamps or recording.duration > length)
            for recording in recordings
        ]
        todo = [
            one.span_from(0, length) if by_time else one.fixed_spans(length)
            for one, by_time in zip(recordings, timed, strict=True)
        ]
        decoded: list[list[Window]] = [[] for _ in recordings]
        while any(todo):
            # A recording's first window comes alone, because it may detect the language.
            now = [row[: None if decoded[i] else 1] for i, row in enumerate(todo)]
            todo = [row[len(taken) :] for row, taken in zip(todo, now, strict=True)]
            spans = [(i, span) for i, row in enumerate(now) for span in row]
            waves = ((recordings[i].name, recordings[i].wave[slice(*span)]) for i, span in spans)
            features = featurise(waves, self.base.feature_extractor)
            windows = [
                Window(i, span, mels, timed[i])
                for (i, span), mels in zip(spans, features, strict=True)
            ]
            for window in windows:
                if before := decoded[window.recording]:
                    window.language, window.prompt = before[0].language, before[0].prompt
            self._decode(windows)
            for window in windows:
                decoded[window.recording].append(window)
                if window.timed:
                    recording, first = recordings[window.recording], window.next_sample(begin or 0)
                    todo[window.recording] = recording.span_from(first, length)
        return decoded

    def _decode(self, windows: Sequence[Window]) -> None:
        """Fill in language, prompt and pieces."""
        for batch, features in batched(windows, self.batch_size, lambda window: window.seconds):
            encoded = encode(self.base, features)
            self._prompt(batch, encoded)
            if batch[0].timed:
                self._decode_timed(batch, encoded)
                continue
            rows = decode(self.base, encoded, [window.prompt for window in batch])
            for window, tokens in zip(batch, rows, strict=True):
                window.pieces = [Piece(0.0, window.seconds, tokens)]

    def _prompt(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Give a prompt to windows without one, in the detected language if none is given."""
        codes = [self.language or ENGLISH] * len(batch)
        multilingual = getattr(self.base.net.generation_config, "is_multilingual", False)
        if not self.language and multilingual and not all(window.prompt for window in batch):
            codes = detect_languages(self.base, encoded)
        for window, code in zip(batch, codes, strict=True):
            if not window.prompt:
                prompt = prompt_ids(self.base.tokenizer, code, self.task)
                window.language = code
                window.prompt = prompt[:-1] if window.timed else prompt

    def _decode_timed(self, batch: Sequence[Window], encoded: Tensor) -> None:
        """Fill in timed pieces, at the lowest temperature whose transcript is accepted."""
        todo = list(range(len(batch)))
        for temperature in DECODING_TEMPERATURES:
            prompts, states = [batch[i].prompt for i in todo], encoded[todo]
            rows = decode_timed(self.base, states, prompts, temperature)
            for i, pieces in zip(todo, rows, strict=True):  # no piece starts after the audio
                batch[i].pieces = [one for one in pieces if one.start < batch[i].seconds]
            scores = score_tokens(self.base, states, prompts, [batch[i].tokens for i in todo])
            failed = []
            for i, one in zip(todo, scores, strict=True):
                text = text_of(self.base, batch[i].tokens).encode()
                is_unlikely = one.mean < MIN_LOG_PROB
                is_repetitive = len(text) > MAX_COMPRESSION * len(zlib.compress(text))
                if is_unlikely and one.no_speech > MAX_NO_SPEECH:
                    batch[i].pieces = []
                elif batch[i].pieces and (is_unlikely or is_repetitive):
                    failed.append(i)
            todo = failed
            if not todo:
                return
