"""Recordings decoded by CTranslate2, through faster-whisper; nothing of torch is imported.

Windows, timestamps, fallback, word times and voice activity detection are faster-whisper's
(https://github.com/SYSTRAN/faster-whisper). Ours are the prompt, which may hold two languages, and
what follows a recording in its window, which is silence, as in a fit, where faster-whisper fills up
log-mels with zeros. A recording that fits the window is decoded without timestamps, as in
evaluation, together with others; one that does not, window by window from its timestamps, or where
a model has none in spans that are cut at pauses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import regex
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import Tokenizer

from blora_pyro.data import SAMPLING_RATE, prompt_ids, read_audio
from blora_pyro.data.audio import Wave
from blora_pyro.errors import UserError
from blora_pyro.files import read_json
from blora_pyro.languages import ENGLISH, UNSPACED
from blora_pyro.transcription.outputs import in_groups
from blora_pyro.transcription.transcripts import SILENCE, Segment, TimedWord, Transcript

ENGINE = "ctranslate2"
ABOUT = "blora-pyro.json"  # in the folder of a converted model, see `About`
LOWEST = -1.5  # log-mel of silence where nothing is loud: (log10(1e-10) + 4) / 4
RANGE = 2.0  # log-mels below the loudest that are told apart: 8 / 4
# The end of a word and a piece of it, such as "re" and "-entered", where spaces are between words.
_CONTINUED = regex.compile(rf"[^\s{UNSPACED}][^\s{UNSPACED}]")


@dataclass(frozen=True)
class About:
    """What a converted model's own files do not say.

    Attributes:
        language: Of the training data, see `RunRecord.language`; empty if there is none.
        task: Of the fit, or "transcribe".
        dtype: Of the fit.
        language_map: See `languages.prompt_codes`.
        timed: Whether the model has timestamp tokens.
        multilingual: Whether it has language tokens.
        suppressed: Tokens that it never says.
        max_length: Positions of its decoder.
        sizes: Bytes of its files by their names.
    """

    language: str = ""
    task: str = "transcribe"
    dtype: str = "float32"
    language_map: Mapping[str, str] = field(default_factory=dict)
    timed: bool = True
    multilingual: bool = True
    suppressed: Sequence[int] = ()
    max_length: int = 448
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "About":
        """Return that of a converted model.

        Raises:
            OSError: If it can't be read.
            ValueError: If it is none.
        """
        content = read_json(folder / ABOUT)
        usual = vars(cls())
        kinds = {name: list if isinstance(one, tuple) else type(one) for name, one in usual.items()}
        if content.keys() != kinds.keys():
            raise ValueError("it holds other names")
        if wrong := [name for name, kind in kinds.items() if not isinstance(content[name], kind)]:
            raise ValueError(f"its {wrong[0]} is of another type")
        if not all(type(one) is int for one in content["suppressed"]):
            raise ValueError("its suppressed are no tokens")
        if not all(type(one) is int for one in content["sizes"].values()):
            raise ValueError("its sizes are no numbers")
        return cls(**content)


@dataclass(frozen=True)
class Settings:
    """How recordings are decoded.

    Attributes:
        language: A code, or "de-en"; None to detect it in the first window of each recording.
        task: "transcribe" or "translate".
        batch_size: Recordings that fit the window and are decoded at once.
        seed: Of what is sampled where greedy decoding fails, see `safeguards`.
        beam_size: Hypotheses of the beam search; 1 is greedy.
        word_timestamps: Find when each word is said, by the alignment heads.
        vad_filter: Leave out what is no speech by Silero's detector before decoding.
        initial_prompt: Text that the first window goes on from.
        hotwords: Words that every window is told of before its own.
    """

    language: str | None = None
    task: str = "transcribe"
    batch_size: int = 16
    seed: int = 0
    beam_size: int = 1
    word_timestamps: bool = False
    vad_filter: bool = False
    initial_prompt: str | None = None
    hotwords: str | None = None


class _Prompted(Tokenizer):
    """faster-whisper's tokenizer with a prompt of our own."""

    def __init__(self, tokenizer: Any, prompt: list[int], language: str) -> None:
        self.tokenizer, self._prompt = tokenizer, prompt
        self.task = self.language = None
        self.language_code = language.split("-")[0]  # of how words are divided

    @property
    def sot_sequence(self) -> list[int]:
        """The prompt, without "no timestamps"."""
        return self._prompt


class _Model:
    """CTranslate2's model; decodes the first windows of several recordings when the first asks."""

    def __init__(self, model: ctranslate2.models.Whisper) -> None:
        self._model, self.batch, self.at = model, _Batch(), -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, features: Any, prompts: list[list[int]], **options: Any) -> Any:
        batch, at, self.at = self.batch, self.at, -1
        if at < 0:  # no first window, or one that is sampled after all
            return self._model.generate(features, prompts, **options)
        if not batch.results:
            begin = prompts[0].index(batch.parts[at].prompt[0])
            rest = begin + len(batch.parts[at].prompt)
            those = [[*prompts[0][:begin], *p.prompt, *prompts[0][rest:]] for p in batch.parts]
            batch.results = self._model.generate(batch.encoded, those, **options)
        return [batch.results[at]]


class _Part:
    """A recording, or a span of one, that is to be decoded; iterates over its segments."""

    def __init__(self, decoder: "Decoder", features: Any, options: Any, rest: Any) -> None:
        self.decoder, self.features, self.options, self.rest = decoder, features, options, rest
        self.prompt: list[int] = []
        self.language = ""

    def __iter__(self) -> Iterator[Any]:
        return self.decoder.segments(self)


@dataclass
class _Batch:
    """Parts whose first windows are encoded and decoded at once."""

    parts: Sequence[_Part] = ()
    encoded: Any = None
    results: Sequence[Any] = ()


class Decoder(WhisperModel):
    """A converted model, and how it decodes."""

    def __init__(self, folder: Path, device: str, dtype: str, settings: Settings) -> None:
        """Load a model.

        Args:
            folder: Of a converted model.
            device: "cpu", "cuda" or "cuda:1".
            dtype: CTranslate2's type of the computation.
            settings: How to decode.
        """
        kind, _, index = device.partition(":")
        numbers = {"device": kind, "device_index": int(index or 0), "compute_type": dtype}
        super().__init__(str(folder), **numbers)
        self.about = About.read(folder)
        self.max_length, self.settings = self.about.max_length, settings
        self.model: Any = _Model(self.model)
        self._planned: _Part | None = None
        self._prompts: dict[tuple[str, str], list[int]] = {}
        self.hf_tokenizer.encode_special_tokens = True  # what is given as text is text
        ctranslate2.set_random_seed(settings.seed)

    def check(self) -> None:
        """Refuse settings that leave no room for a transcript.

        Raises:
            UserError: If what is said before it has more tokens than half of the positions.
        """
        given = [one for one in ("initial_prompt", "hotwords") if getattr(self.settings, one)]
        texts = [f" {getattr(self.settings, one)}" for one in given]
        count = sum(len(self.hf_tokenizer.encode(text).ids) for text in texts)
        if count > (most := self.max_length // 2 - 1):
            raise UserError(
                f"{' and '.join(given)} would take {count} tokens, and the decoder has room for "
                f"{most} before a transcript; give fewer words"
            )

    def check_device(self) -> None:
        """Encode a silent window; RuntimeError if a library of the device is missing."""
        self.encode(np.zeros((self.feature_extractor.mel_filters.shape[0], 1), np.float32))

    # ---- what faster-whisper calls

    def generate_segments(self, features: Any, tokenizer: Any, options: Any, *rest: Any) -> Any:
        """Put off the decoding of a recording whose features are known."""
        self._planned = _Part(self, features, options, rest)
        return self._planned

    def encode(self, features: Any) -> Any:
        """Encode a window, (mels, frames), with silence after its end."""
        batch, at = self.model.batch, self.model.at
        if at >= 0:
            if len(batch.parts) == 1:
                return batch.encoded
            return ctranslate2.StorageView.from_array(np.array(batch.encoded)[at : at + 1])
        return super().encode(self._window(features))

    # ---- decoding

    def segments(self, part: _Part) -> Iterator[Any]:
        """Yield the segments of a part of the batch."""
        self.model.at = self.model.batch.parts.index(part)
        tokenizer = _Prompted(self.hf_tokenizer, part.prompt, part.language)
        found = super().generate_segments(part.features, tokenizer, part.options, *part.rest)
        # Without timestamps a window is a segment. With word times faster-whisper would go on from
        # the last word, and hear words in the rest of a recording, in which there are none.
        yield from islice(found, 1) if part.options.without_timestamps else found

    def decode(
        self,
        recordings: Sequence[tuple[str, Wave]],
        on_progress: Callable[[float], object] = lambda share: None,
    ) -> list[Transcript]:
        """Return the transcripts of recordings by name, their samples (samples,) at 16 kHz.

        `on_progress` is called with the share of their seconds that is decoded.

        Raises:
            UserError: If the tokenizer lacks the language or the task.
        """
        found: list[list[Segment]] = [[] for _ in recordings]
        languages = [self.settings.language or ""] * len(recordings)
        waiting: list[tuple[int, float, float, _Part, Iterable[Any]]] = []
        for index, (_, wave) in enumerate(recordings):
            for first, end in self._spans(wave):
                part, segments = self._plan(wave[first:end])
                start, length = first / SAMPLING_RATE, (end - first) / SAMPLING_RATE
                waiting.append((index, start, length, part, segments))
        # A batch is decoded with one prompt's end: with timestamps, or without.
        short = [one for one in waiting if one[3].options.without_timestamps]
        size = self.settings.batch_size
        batches = [short[at : at + size] for at in range(0, len(short), size)]
        batches += [[one] for one in waiting if not one[3].options.without_timestamps]
        seconds, done = sum(length for _, _, length, *_ in waiting) or 1.0, 0.0
        for batch in batches:
            parts = [part for *_, part, _ in batch if self._is_audible(part)]
            if parts:
                self._prepare(parts)
            for index, start, length, part, segments in batch:
                if part in parts:
                    languages[index] = languages[index] or part.language
                    for one in _read(segments, start, length, self.settings.word_timestamps):
                        found[index].append(one)
                        on_progress((done + one.end - start) / seconds)
                done += length
                on_progress(done / seconds)
        self.model.batch = _Batch()
        return [
            Transcript(name, language, len(wave) / SAMPLING_RATE, tuple(those), ENGINE)
            for (name, wave), language, those in zip(recordings, languages, found, strict=True)
        ]

    def _spans(self, wave: Wave) -> list[tuple[int, int]]:
        """Return the spans of samples that a recording is decoded in."""
        if self.about.timed or len(wave) <= self._seconds * SAMPLING_RATE:
            return [(0, len(wave))]
        from blora_pyro.transcription.windows import cut_at_pauses  # which imports torch

        return cut_at_pauses(wave, self._seconds)

    def _plan(self, wave: Wave) -> tuple[_Part, Iterable[Any]]:
        """Return what is to be decoded, and its segments, once it is."""
        settings = self.settings
        segments, _ = self.transcribe(
            wave,
            language=ENGLISH.code,  # the prompt is our own
            task=settings.task,
            beam_size=settings.beam_size,
            condition_on_previous_text=False,
            suppress_tokens=[*self.about.suppressed],
            without_timestamps=len(wave) <= self._seconds * SAMPLING_RATE,
            word_timestamps=settings.word_timestamps,
            vad_filter=settings.vad_filter,
            initial_prompt=settings.initial_prompt,
            hotwords=settings.hotwords,
        )
        assert self._planned is not None
        return self._planned, segments

    def _prepare(self, parts: Sequence[_Part]) -> None:
        """Encode the first windows of parts, and find their languages."""
        windows = np.stack([self._window(part.features[:, : self._frames(part)]) for part in parts])
        self.model.batch, self.model.at = _Batch(parts), -1
        self.model.batch.encoded = super().encode(windows)
        codes = [self.settings.language or ("" if self.about.multilingual else ENGLISH.code)]
        codes *= len(parts)
        if not codes[0]:
            rows = self.model.detect_language(self.model.batch.encoded)
            codes = [row[0][0].strip("<|>") for row in rows]
        for part, code in zip(parts, codes, strict=True):
            part.prompt, part.language = self._prompt(code), code

    def _prompt(self, code: str) -> list[int]:
        """Return the prompt in a language, without "no timestamps"."""
        key = code, self.settings.task
        if key not in self._prompts:  # a tokenizer takes its time
            known = self.about.language_map
            self._prompts[key] = prompt_ids(self.hf_tokenizer, *key, known)[:-1]
        return self._prompts[key]

    def _window(self, features: Any) -> Any:
        """Return log-mels, (mels, frames), in a window of the model's that ends in silence."""
        heard = np.flatnonzero(features.any(0))  # faster-whisper has filled them up with zeros
        last = min(int(heard[-1]) + 1 if len(heard) else 0, self._most_frames)
        silence = max(float(features.max()) - RANGE, LOWEST) if last else LOWEST
        window = np.full((features.shape[0], self._most_frames), silence, np.float32)
        window[:, :last] = features[:, :last]
        return window

    def _is_audible(self, part: _Part) -> bool:
        """Whether there is anything left to hear, and it is not silence."""
        return self._frames(part) > 0 and float(part.features.max()) > SILENCE

    def _frames(self, part: _Part) -> int:
        return int(part.features.shape[-1]) - 1  # of the last faster-whisper makes no use

    @property
    def _most_frames(self) -> int:
        return int(self.feature_extractor.nb_max_frames)

    @property
    def _seconds(self) -> float:
        return float(self.feature_extractor.chunk_length)


def _read(segments: Iterable[Any], start: float, length: float, timed: bool) -> Iterator[Segment]:
    """Yield segments of ours: times in the recording, texts without outer spaces."""
    for one in segments:
        words: list[TimedWord] = []
        for word in one.words or ():
            text, probability = str(word.word), float(word.probability)
            begin, end = (start + min(float(time), length) for time in (word.start, word.end))
            if words and _CONTINUED.match(words[-1].text[-1:] + text):
                last = words.pop()
                text, begin = last.text + text, last.start
                probability = (last.probability + probability) / 2
            words.append(TimedWord(text.strip(), begin, end, probability))
        first, end = (start + min(float(time), length) for time in (one.start, one.end))
        yield Segment(first, end, one.text.strip(), times=tuple(words) if timed else None)


def transcribe_files(
    decoder: Decoder,
    paths: Sequence[str | Path],
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
    on_progress: Callable[[float], object] = lambda files: None,
) -> list[Transcript]:
    """Transcripts of audio files, in their order; see `transcriber.transcribe_files`."""

    def read(path: str | Path) -> tuple[str, Wave]:
        return str(path), read_audio({"path": str(path)})

    def is_full(recordings: Sequence[tuple[str, Wave]]) -> bool:
        size = decoder.settings.batch_size
        samples = sum(len(wave) for _, wave in recordings)
        return len(recordings) >= size or samples > size * decoder.feature_extractor.n_samples

    return in_groups(paths, read, is_full, decoder.decode, on_transcript, on_error, on_progress)
