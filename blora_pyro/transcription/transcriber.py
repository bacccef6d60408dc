"""Transcripts of recordings, with word confidences from posterior draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path

import torch
from torch import Tensor

from blora_pyro.data import Features, read_audio
from blora_pyro.errors import UserError, check_positive
from blora_pyro.models import Base
from blora_pyro.models.decoding import decode, decode_timed, encode, score_tokens
from blora_pyro.posterior import Posterior
from blora_pyro.transcription.confidence import Speller, Spelling, Tally
from blora_pyro.transcription.long_form import LongFormDecoder, text_of
from blora_pyro.transcription.transcripts import Segment, Transcript, Word
from blora_pyro.transcription.windows import Recording, Window, batched

BATCH_SIZE = 64  # in evaluation
BATCHES_IN_MEMORY = 8  # recordings are read for so many batches at a time

Words = Mapping[Window, list[tuple[Word, ...]]]  # words of each piece, by window


def transcribe_features(
    base: Base,
    features: Tensor | Features,
    prompts: Sequence[Sequence[int]],
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Greedy transcripts of log-mels (n, mels, frames), each with its own prompt, in order."""
    texts = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            encoded = encode(base, features[chosen])
            decoded = decode(base, encoded, [prompts[index] for index in chosen])
            for index, tokens in zip(chosen, decoded, strict=True):
                texts[index] = text_of(base, tokens)
    return texts


@dataclass(frozen=True)
class Transcriber:
    """Transcribes recordings.

    Attributes:
        base: A Whisper model.
        posterior: Its mean adapts the base; None for the base alone.
        language: A code, or "de-en" for code-switched speech; None to detect it in the first window
            of each recording.
        task: "transcribe" or "translate".
        timestamps: Ask for timestamps even if one window holds the whole recording; ignored for a
            model without timestamp tokens.
        batch_size: Windows per batch.
        samples: Posterior draws for word confidences; 0 for none.
        seed: Seed of the draws, and of windows sampled at a temperature, see `long_form`.
    """

    base: Base
    posterior: Posterior | None = None
    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False
    batch_size: int = 16
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options; UserError if `samples` asks for draws where there are none."""
        check_positive(batch_size=self.batch_size)
        if self.samples < 0:
            raise UserError(f"samples is {self.samples}; give the number of draws, or 0 for none")
        if self.samples and self.posterior is None:
            raise UserError(f"samples is {self.samples}, but there is no adapter to draw from")
        if self.samples and self.posterior is not None:
            self.posterior.guide  # noqa: B018 - raises for a file that was not named
            if not any(stddev.any() for stddev in self.posterior.stddev.values()):
                raise UserError(
                    f"samples is {self.samples}, but the adapter is a point estimate, all of whose "
                    "draws are alike; leave samples out"
                )

    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        """Transcripts of recordings, in their order.

        Raises:
            UserError: If the tokenizer lacks the language or the task.
        """
        decoder = LongFormDecoder(
            self.base, self.language, self.task, self.timestamps, self.batch_size
        )
        device = self.base.net.device
        with self._adapted(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)  # for windows sampled at a temperature
            decoded = decoder.decode(recordings)
        words = self._words([window for row in decoded for window in row]) if self.samples else {}
        transcripts: list[Transcript] = []
        for recording, windows in zip(recordings, decoded, strict=True):
            language = windows[0].language if windows else self.language or ""
            segments = tuple(one for window in windows for one in self._segments(window, words))
            transcripts.append(Transcript(recording.name, language, recording.duration, segments))
        return transcripts

    def _adapted(self, draw: Mapping[str, Tensor] | None = None) -> AbstractContextManager[None]:
        """Adapt the net by the posterior mean or by a draw, if there is a posterior."""
        return self.posterior.applied(self.base.net, draw) if self.posterior else nullcontext()

    def _words(self, windows: Sequence[Window]) -> Words:
        """Words with confidences, by piece of every window."""
        assert self.posterior is not None
        speller = Speller(self.base.tokenizer)
        spelled: dict[Window, list[list[Spelling]]] = {}
        for window in windows:
            starts = accumulate((len(piece.tokens) for piece in window.pieces), initial=0)
            spelled[window] = [
                speller.spell(piece.tokens, start)
                for piece, start in zip(window.pieces, starts, strict=False)
            ]
        tallies = {
            window: Tally(list(chain.from_iterable(pieces))) for window, pieces in spelled.items()
        }
        for draw in self.posterior.draws(self.samples, self.seed):
            with self._adapted(draw):
                for batch, features in batched(windows, self.batch_size, lambda w: len(w.tokens)):
                    for window, log_probs, decoded in self._judge(batch, features):
                        tallies[window].add(log_probs, speller.spell(decoded))
        words = {}
        for window, pieces in spelled.items():
            rest = iter(tallies[window].words())
            words[window] = [tuple(islice(rest, len(piece))) for piece in pieces]
        return words

    def _judge(
        self, batch: Sequence[Window], features: Tensor
    ) -> Iterator[tuple[Window, Tensor, list[int]]]:
        """Yield (window, log-probabilities of its tokens, the net's own transcript)."""
        prompts = [window.prompt for window in batch]
        encoded = encode(self.base, features)
        scores = score_tokens(self.base, encoded, prompts, [window.tokens for window in batch])
        if batch[0].timed:
            pieces = decode_timed(self.base, encoded, prompts)
            decoded = [[token for piece in row for token in piece.tokens] for row in pieces]
        else:
            decoded = decode(self.base, encoded, prompts)
        for window, one, tokens in zip(batch, scores, decoded, strict=True):
            yield window, one.log_probs, tokens

    def _segments(self, window: Window, words: Words) -> Iterator[Segment]:
        """Segments of a window, with times in the recording."""
        found = words.get(window, [None] * len(window.pieces))
        for piece, sure in zip(window.pieces, found, strict=True):
            if text := text_of(self.base, piece.tokens):
                start, end = (min(time, window.seconds) for time in (piece.start, piece.end))
                yield Segment(window.start + start, window.start + end, text, sure)


def transcribe_files(
    transcriber: Transcriber,
    paths: Sequence[str | Path],
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
) -> list[Transcript]:
    """Transcripts of wav, flac, ogg/opus or mp3 files, in their order.

    `on_transcript` is called with each file's index and transcript, in order, and `on_error` with
    the index of a file that can't be read and the error; the file is then left out. None raises it.

    Raises:
        UserError: If a file can't be read, or as `Transcriber.transcribe`.
    """
    done: list[Transcript] = []
    for indices, recordings in _groups(transcriber, paths, on_error):
        transcripts = transcriber.transcribe(recordings)
        for index, transcript in zip(indices, transcripts, strict=True):
            on_transcript(index, transcript)
        done += transcripts
    return done


def _groups(
    transcriber: Transcriber,
    paths: Sequence[str | Path],
    on_error: Callable[[int, UserError], None] | None,
) -> Iterator[tuple[list[int], list[Recording]]]:
    """Yield indices and recordings of files that are held in memory together."""
    window = transcriber.base.feature_extractor.chunk_length
    indices: list[int] = []
    recordings: list[Recording] = []
    windows = 0
    for index, path in enumerate(paths):
        try:
            recording = Recording(str(path), read_audio({"path": str(path)}))
        except UserError as error:
            if on_error is None:
                raise
            on_error(index, error)
            continue
        indices.append(index)
        recordings.append(recording)
        windows += math.ceil(recording.duration / window)
        if windows >= BATCHES_IN_MEMORY * transcriber.batch_size:
            yield indices, recordings
            indices, recordings, windows = [], [], 0
    if recordings:
        yield indices, recordings
