"""Transcripts of recordings, with word confidences from posterior draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path

import torch
from torch import Tensor

from blora_pyro.data import SAMPLING_RATE, Features, read_audio, stream_audio
from blora_pyro.errors import UserError, check_positive
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    alike_in_length,
    decode,
    decode_timed,
    encode,
    score_tokens,
    text_of,
)
from blora_pyro.models.encoder_states import EncoderStates
from blora_pyro.posterior import Posterior
from blora_pyro.transcription.long_form import BATCHES_IN_MEMORY, LongFormDecoder
from blora_pyro.transcription.outputs import in_groups
from blora_pyro.transcription.safeguards import decode_safely, hearings
from blora_pyro.transcription.transcripts import Segment, Transcript, Word
from blora_pyro.transcription.windows import Recording, StreamedWave, Window, batched
from blora_pyro.transcription.words import Speller, Spelling, Tally

BATCH_SIZE = 64  # in evaluation
LONG = 600  # seconds that a recording has in memory at most

Words = Mapping[Window, list[tuple[Word, ...]]]  # words of each piece, by window


def transcribe_features(
    base: Base,
    features: Tensor | Features,
    prompts: Sequence[Sequence[int]],
    batch_size: int = BATCH_SIZE,
    encoder: Callable[[Sequence[int]], Tensor] | None = None,
    on_done: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """Transcripts of log-mels (n, mels, frames), each with its own prompt, in order.

    Each is what `Transcriber` says of the same sound; see `safeguards`. `encoder` returns the
    encoder's states of some of them, (indices, positions, width); None is the base's, as it is.
    `on_done` is called with how many are done, after every batch.
    """
    texts, done = [""] * len(prompts), 0
    for chosen in alike_in_length(prompts, batch_size):
        heard = hearings(base, features[chosen])
        audible = [i for i, one in zip(chosen, heard, strict=True) if not one.is_silent]
        if audible:
            encoded = encoder(audible) if encoder else encode(base, features[audible])
            known = [one for one in heard if not one.is_silent]
            rows = decode_safely(base, encoded, [prompts[index] for index in audible], known)
            for index, pieces in zip(audible, rows, strict=True):
                texts[index] = "".join(text_of(base, piece.tokens) for piece in pieces)
        done += len(chosen)
        on_done(done)
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
        batch_size: Windows per batch.
        samples: Posterior draws for word confidences; 0 for none.
        seed: Seed of the draws, and of windows sampled at a temperature, see `safeguards`.
        word_timestamps: Find when each word is said, by the alignment heads.
    """

    base: Base
    posterior: Posterior | None = None
    language: str | None = None
    task: str = "transcribe"
    batch_size: int = 16
    samples: int = 0
    seed: int = 0
    word_timestamps: bool = False

    def __post_init__(self) -> None:
        """Check the options; UserError if `samples` asks for draws where there are none."""
        check_positive(batch_size=self.batch_size)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 below {2**32}")
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

    def transcribe(
        self,
        recordings: Sequence[Recording],
        on_progress: Callable[[float], object] = lambda share: None,
    ) -> list[Transcript]:
        """Transcripts of recordings, in their order.

        `on_progress` is called with the share of their seconds that is transcribed.

        Raises:
            UserError: If the tokenizer lacks the language or the task.
        """
        languages = [self.language or ""] * len(recordings)
        segments: list[list[Segment]] = [[] for _ in recordings]
        seconds, all_seconds = [0.0] * len(recordings), sum(one.duration for one in recordings)
        for windows in self._decoded(recordings):
            words = self._words(windows) if self.samples else {}
            for one in windows:
                languages[one.recording] = languages[one.recording] or one.language
                segments[one.recording] += self._segments(one, words)
                seconds[one.recording] = one.start + one.seconds
            if windows:
                on_progress(sum(seconds) / (all_seconds or 1.0))
        return [
            Transcript(one.name, language, one.duration, tuple(found))
            for one, language, found in zip(recordings, languages, segments, strict=True)
        ]

    def _decoded(self, recordings: Sequence[Recording]) -> Iterator[list[Window]]:
        """Yield decoded windows; with draws as many at a time as are kept in memory."""
        rounds = LongFormDecoder(
            self.base,
            self.language,
            self.task,
            self.batch_size,
            self.seed,
            self.word_timestamps,
        ).decode(recordings)
        waiting: list[Window] = []
        while True:
            with self._adapted():
                windows = next(rounds, None)
            waiting += windows or []
            if windows is None or not self.samples or len(waiting) >= self._most_windows:
                yield waiting
                waiting = []
            if windows is None:
                return

    @property
    def _most_windows(self) -> int:
        return BATCHES_IN_MEMORY * self.batch_size

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
        encoder = self._encoder(windows)
        for draw in self.posterior.draws(self.samples, self.seed):
            with self._adapted(draw):
                for batch, features in batched(windows, self.batch_size, lambda w: len(w.tokens)):
                    for window, log_probs, decoded in self._judge(batch, features, encoder(batch)):
                        tallies[window].add(log_probs, speller.spell(decoded))
        words = {}
        for window, pieces in spelled.items():
            rest = iter(tallies[window].words())
            words[window] = [tuple(islice(rest, len(piece))) for piece in pieces]
        return words

    def _encoder(self, windows: Sequence[Window]) -> Callable[[Sequence[Window]], Tensor]:
        """Return what encodes some of the windows: once for all draws, if none changes that."""
        assert self.posterior is not None

        def encoded(some: Sequence[Window]) -> Tensor:
            return encode(self.base, torch.stack([window.features for window in some]))

        net, places = self.base.net, {window: place for place, window in enumerate(windows)}
        if self.samples == 1 or not self.posterior.leaves_encoder(net):
            return encoded
        shape = net.config.max_source_positions, net.config.d_model
        try:
            kept = EncoderStates(len(windows), shape, net.dtype)
        except UserError:  # no room
            return encoded

        def stored(some: Sequence[Window]) -> Tensor:
            indices = [places[window] for window in some]
            states = kept.of(indices, lambda new: encoded([windows[place] for place in new]))
            return states.to(net.device)

        return stored

    def _judge(
        self, batch: Sequence[Window], features: Tensor, encoded: Tensor
    ) -> Iterator[tuple[Window, Tensor, list[int]]]:
        """Yield (window, log-probabilities of its tokens, the net's own transcript)."""
        prompts = [window.prompt for window in batch]
        scores = score_tokens(self.base, encoded, prompts, [window.tokens for window in batch])
        limits = [one.limit for one in hearings(self.base, features)]
        if batch[0].timed:
            pieces = decode_timed(self.base, encoded, prompts, limits)
            decoded = [[token for piece in row for token in piece.tokens] for row in pieces]
        else:
            decoded = decode(self.base, encoded, prompts, limits)
        for window, one, tokens in zip(batch, scores, decoded, strict=True):
            yield window, one.log_probs, tokens

    def _segments(self, window: Window, words: Words) -> Iterator[Segment]:
        """Segments of a window, with times in the recording."""
        unknown = [None] * len(window.pieces)
        found, said = words.get(window, unknown), window.times or unknown
        for piece, sure, times in zip(window.pieces, found, said, strict=True):
            if text := text_of(self.base, piece.tokens):
                start, end = (min(time, window.seconds) for time in (piece.start, piece.end))
                placed = None if times is None else tuple(one.moved(window.start) for one in times)
                yield Segment(window.start + start, window.start + end, text, sure, placed)


def transcribe_files(
    transcriber: Transcriber,
    paths: Sequence[str | Path],
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
    on_progress: Callable[[float], object] = lambda files: None,
) -> list[Transcript]:
    """Transcripts of audio files (wav, mp3, m4a, webm, ...), in their order.

    `on_transcript` is called with each file's index and transcript, in order, and `on_error` with
    the index of a file that can't be read and the error; the file is then left out. None raises it.
    `on_progress` is called with the number of files that are done, and what part of those that are
    transcribed together is.

    Raises:
        UserError: If a file can't be read, or as `Transcriber.transcribe`.
    """
    window = transcriber.base.feature_extractor.chunk_length

    def is_full(recordings: Sequence[Recording]) -> bool:
        windows = sum(math.ceil(one.duration / window) for one in recordings)
        return windows >= transcriber._most_windows

    return in_groups(
        paths, _open, is_full, transcriber.transcribe, on_transcript, on_error, on_progress
    )


def _open(path: str | Path) -> Recording:
    """Return a file's recording, of whose samples few are in memory if it is long."""
    audio = {"path": str(path)}
    wave = StreamedWave(str(path), partial(stream_audio, audio))
    # A short one is resampled as a whole, as for its evaluation.
    is_long = len(wave) > LONG * SAMPLING_RATE
    return Recording(str(path), wave if is_long else read_audio(audio))
