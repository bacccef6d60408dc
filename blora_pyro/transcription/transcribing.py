"""Recordings to transcripts, and how sure a posterior is of their words."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from blora_pyro.data import Features, read_audio
from blora_pyro.errors import UserError, check_positive
from blora_pyro.models import Base
from blora_pyro.models.decoding import decode, decode_timed, encode, score_tokens
from blora_pyro.posterior import Posterior
from blora_pyro.transcription.confidence import Speller, Spelling, Tally
from blora_pyro.transcription.hearing import Hearing, text_of
from blora_pyro.transcription.transcripts import Segment, Transcript, Word
from blora_pyro.transcription.windows import Recording, Window, batched

BATCH_SIZE = 64  # in evaluation
GROUP = 8  # batches whose recordings are in memory together

Words = Mapping[Window, list[tuple[Word, ...]]]  # by piece of each window


def transcribe_features(
    base: Base,
    features: Tensor | Features,
    prompts: Sequence[Sequence[int]],
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Greedy transcripts of log-mels (n, mels, frames), in order, each after its own prompt."""
    texts = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            encoded = encode(base, features[chosen])
            said = decode(base, encoded, [prompts[index] for index in chosen])
            for index, tokens in zip(chosen, said, strict=True):
                texts[index] = text_of(base, tokens)
    return texts


@dataclass(frozen=True)
class Transcriber:
    """How recordings are transcribed.

    Attributes:
        base: A Whisper.
        posterior: Adapts it; the transcript is that of the posterior mean. None is the base alone.
        language: A code, or "de-en" for code-switched speech; None is what the model detects in the
            first window of each recording.
        task: "transcribe" or "translate".
        timestamps: Ask for timestamps also where one window holds the whole recording; a model
            without timestamp tokens is never asked.
        batch_size: Windows that are heard at once.
        samples: Draws of the posterior for the confidences of words; 0 is none.
        seed: Of the draws, and of windows that go astray, see `hearing`.
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
        """Check what can be checked before anything is read.

        Raises:
            UserError: If draws are asked for where there are none, or a number is out of range.
        """
        check_positive(batch_size=self.batch_size)
        if self.samples < 0:
            raise UserError(f"samples is {self.samples}; give the number of draws, or 0 for none")
        if self.samples and self.posterior is None:
            raise UserError(f"samples is {self.samples}, but there is no adapter to draw from")
        if self.samples and self.posterior is not None:
            self.posterior.guide  # noqa: B018 - raises where it is in a file that was not named
            if not any(stddev.any() for stddev in self.posterior.stddev.values()):
                raise UserError(
                    f"samples is {self.samples}, but the adapter is a point estimate, all of whose "
                    "draws are alike; leave samples out"
                )

    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        """Transcripts of recordings, in their order.

        Raises:
            UserError: If the tokenizer does not know the language or the task.
        """
        hearing = Hearing(self.base, self.language, self.task, self.timestamps, self.batch_size)
        device = self.base.net.device
        with self._adapted(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)  # a window that goes astray is drawn anew
            heard = hearing.hear(recordings)
        words = self._words([window for row in heard for window in row]) if self.samples else {}
        transcripts: list[Transcript] = []
        for recording, windows in zip(recordings, heard, strict=True):
            language = windows[0].language if windows else self.language or ""
            segments = tuple(one for window in windows for one in self._segments(window, words))
            transcripts.append(Transcript(recording.name, language, recording.duration, segments))
        return transcripts

    def _adapted(self, draw: Mapping[str, Tensor] | None = None) -> AbstractContextManager[None]:
        """The net adapted by the posterior mean or by a draw, if there is a posterior."""
        return self.posterior.applied(self.base.net, draw) if self.posterior else nullcontext()

    def _words(self, windows: Sequence[Window]) -> Words:
        """What the draws make of the words of every piece of every window."""
        assert self.posterior is not None
        speller = Speller(self.base.tokenizer)
        spelled = {window: _spell_pieces(speller, window) for window in windows}
        tallies = {
            window: Tally(list(chain.from_iterable(pieces))) for window, pieces in spelled.items()
        }
        for draw in self.posterior.draws(self.samples, self.seed):
            with self._adapted(draw):
                for batch, features in batched(windows, self.batch_size, lambda w: len(w.tokens)):
                    for window, log_probs, said in self._judge(batch, features):
                        tallies[window].add(log_probs, speller.spell(said))
        words = {}
        for window, pieces in spelled.items():
            rest = iter(tallies[window].words())
            words[window] = [tuple(islice(rest, len(piece))) for piece in pieces]
        return words

    def _judge(
        self, batch: Sequence[Window], features: Tensor
    ) -> Iterator[tuple[Window, Tensor, list[int]]]:
        """Log-probabilities of each window's tokens under the net as it is, and what it says."""
        prompts = [window.prompt for window in batch]
        encoded = encode(self.base, features)
        scores = score_tokens(self.base, encoded, prompts, [window.tokens for window in batch])
        if batch[0].timed:
            pieces = decode_timed(self.base, encoded, prompts)
            said = [[token for piece in row for token in piece.tokens] for row in pieces]
        else:
            said = decode(self.base, encoded, prompts)
        for window, one, tokens in zip(batch, scores, said, strict=True):
            yield window, one.log_probs, tokens

    def _segments(self, window: Window, words: Words) -> Iterator[Segment]:
        """What was said in a window, at its times in the recording."""
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
    """Transcripts of audio files, in their order.

    Args:
        transcriber: How.
        paths: wav, flac, ogg/opus or mp3 files.
        on_transcript: Told each file's place and transcript, in order, as they come.
        on_error: Told the place of a file that can't be read, and why, which is then left out; None
            raises.

    Raises:
        UserError: If a file can't be read, or as `Transcriber.transcribe`.
    """
    done: list[Transcript] = []
    for places, recordings in _groups(transcriber, paths, on_error):
        transcripts = transcriber.transcribe(recordings)
        for place, transcript in zip(places, transcripts, strict=True):
            on_transcript(place, transcript)
        done += transcripts
    return done


def _groups(
    transcriber: Transcriber,
    paths: Sequence[str | Path],
    on_error: Callable[[int, UserError], None] | None,
) -> Iterator[tuple[list[int], list[Recording]]]:
    """Files that are in memory together: enough for batches of windows of like length."""
    window = transcriber.base.feature_extractor.chunk_length
    places: list[int] = []
    recordings: list[Recording] = []
    windows = 0
    for place, path in enumerate(paths):
        try:
            recording = Recording(str(path), read_audio({"path": str(path)}))
        except UserError as error:
            if on_error is None:
                raise
            on_error(place, error)
            continue
        places.append(place)
        recordings.append(recording)
        windows += math.ceil(recording.duration / window)
        if windows >= GROUP * transcriber.batch_size:
            yield places, recordings
            places, recordings, windows = [], [], 0
    if recordings:
        yield places, recordings


def _spell_pieces(speller: Speller, window: Window) -> list[list[Spelling]]:
    """Words of every piece; the places of their tokens are those in the whole window."""
    rows, offset = [], 0
    for piece in window.pieces:
        rows.append(speller.spell(piece.tokens, offset))
        offset += len(piece.tokens)
    return rows
