"""Examples, featurised and tokenised once, and the batches made of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from blora_pyro.data.features import Features, OnNote, OnProgress, load_features, trim
from blora_pyro.data.prompts import Encoder
from blora_pyro.data.rows import BadRow, OnBadRow, all_bad, located, stop
from blora_pyro.errors import UserError
from blora_pyro.languages import language_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

IGNORED = -100  # the label that is no target, as cross-entropy's ignore_index


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """What a teacher would say to a batch's audio, token by token, for the student to stay near.

    Attributes:
        decoder_input_ids: (batch, tokens), int64.
        log_probs: of the teacher's next token, (batch, tokens, vocabulary).
        is_target: which positions count, (batch, tokens), bool.
        weight: of the mean Kullback-Leibler divergence over these positions in the loss.
    """

    decoder_input_ids: Tensor
    log_probs: Tensor
    is_target: Tensor
    weight: float

    def to(self, device: torch.device | str) -> "SoftTargets":
        """Return them on a device."""
        inputs, log_probs = self.decoder_input_ids.to(device), self.log_probs.to(device)
        return SoftTargets(inputs, log_probs, self.is_target.to(device), self.weight)

    @property
    def num_tokens(self) -> int:
        """The number of positions that count."""
        return int(self.is_target.sum())


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model takes for one step.

    `labels[i, t]` is the token that follows `decoder_input_ids[i, t]`, or -100 where that is no
    target: inside the prompt and in the padding. Without labels the Pyro program samples tokens.
    `sources[i]` is the place of the utterance's source in a mixture, its domain; None is unknown.
    `encoder_states` are those before the encoder's first adapted layer; None has them computed.
    """

    input_features: Tensor  # (batch, mels, frames), float32
    decoder_input_ids: Tensor  # (batch, tokens), int64
    labels: Tensor | None  # (batch, tokens), int64
    soft: SoftTargets | None = None
    sources: Tensor | None = None  # (batch,), int64
    encoder_states: Tensor | None = None  # (batch, positions, width)

    @property
    def num_tokens(self) -> int:
        """The number of target tokens; every position counts in a batch without labels."""
        if self.labels is None:
            return self.decoder_input_ids.numel()
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        soft = None if self.soft is None else self.soft.to(device)
        inputs = self.input_features.to(device), self.decoder_input_ids.to(device)
        sources = None if self.sources is None else self.sources.to(device)
        states = None if self.encoder_states is None else self.encoder_states.to(device)
        return Batch(*inputs, labels, soft, sources, states)


class Examples:
    """A data set as features and token lists, n utterances; `batch` makes batches of it.

    Attributes:
        texts: the n transcripts.
        languages: the n languages by their codes, "de" or "de-en".
        word_languages: n lists of language codes, one for each token of the text, or empty.
        origins: n places in what was read, such as "corpus/test.csv, line 7".
        audio_paths: n paths of audio files, None where a row's audio has none.
        segments: n pairs of seconds, where a row is from and to in its audio; None is either end.
        sources: n places, each of the row's source in a mixture; 0 without one.
        prompts: n lists of token ids, the decoder's prompts.
        targets: n lists of token ids, text and end token; the prompts are never targets.
        features: log-mel spectrograms, as good as a tensor (n, mels, frames), float16 on the CPU.
        fingerprint: a text that changes with the content of audio, segments, prompts or targets.
    """

    def __init__(
        self,
        dataset: Dataset,
        feature_extractor: "WhisperFeatureExtractor",
        tokenizer: "PreTrainedTokenizerBase",
        task: str = "transcribe",
        max_tokens: int = 448,
        *,
        language: str | None = None,
        on_bad: OnBadRow = stop,
        cache: bool = True,
        trim: bool = False,
        on_progress: OnProgress = lambda done, total: None,
        on_note: OnNote = lambda note: None,
    ) -> None:
        """Read, featurise and tokenise everything.

        Args:
            dataset: with the columns of `read_manifest`.
            feature_extractor: the model's; its window is the longest audio allowed.
            tokenizer: the model's.
            task: "transcribe" or "translate".
            max_tokens: the decoder's length, the model's `max_target_positions`.
            language: of rows that name none, see `language_code`.
            on_bad: told of every bad row: one whose audio cannot be read or is longer than the
                window, whose language is unknown to the tokenizer, or whose transcript is longer
                than the decoder. Where it does not raise, the row is left out.
            cache: keep the features on disk, see `load_features`.
            trim: cut every batch after its longest utterance, see `features.trim`.
            on_progress: told how many utterances are featurised.
            on_note: told if the cache cannot be written.

        Raises:
            UserError: with the row's origin, by `on_bad`; or if all rows of a source are bad.
        """
        bad: list[BadRow] = []

        def tell(error: BadRow) -> None:
            bad.append(error)
            on_bad(error)

        encoder = Encoder(tokenizer, language, task, max_tokens)
        self._trim = trim
        encoded = _encode(dataset, encoder, tell)
        numbers = list(encoded)
        good = dataset if len(numbers) == len(dataset) else dataset.select(numbers)
        self.features, contents = load_features(
            good,
            feature_extractor,
            cache=cache,
            on_bad=tell,
            on_progress=on_progress,
            on_note=on_note,
        )
        self._keep([encoded[numbers[number]] for number in contents], encoder.end)
        _check_left(bad, self.sources)
        self.fingerprint = _fingerprint(contents.values(), self.languages, self.texts)

    @classmethod
    def of_rows(
        cls, rows: Sequence[tuple["Encoded", Tensor]], end: int, trim: bool = False
    ) -> "Examples":
        """One or more rows that are tokenised and featurised already; see `Stream`.

        Args:
            rows: what was encoded, and log-mels, (mels, frames), float16.
            end: the tokenizer's end token.
            trim: cut every batch after its longest utterance.
        """
        examples = cls.__new__(cls)
        examples._trim = trim
        mels, frames = rows[0][1].shape
        examples.features = Features([(one[None], 0) for _, one in rows], (mels, frames))
        examples._keep([row for row, _ in rows], end)
        examples.fingerprint = _fingerprint(examples.languages, examples.texts)
        return examples

    def _keep(self, rows: Sequence["Encoded"], end: int) -> None:
        self._end = end
        self.texts: list[str] = [row.text for row in rows]
        self.languages: list[str] = [row.language for row in rows]
        self.word_languages: list[list[str]] = [row.word_languages for row in rows]
        self.origins: list[str] = [row.origin for row in rows]
        self.audio_paths: list[str | None] = [row.audio_path for row in rows]
        self.segments: list[tuple[float | None, float | None]] = [row.segment for row in rows]
        self.sources: list[int] = [row.source for row in rows]
        self.prompts: list[list[int]] = [row.prompt for row in rows]
        self.targets: list[list[int]] = [row.target for row in rows]

    def __len__(self) -> int:
        """The number of utterances."""
        return len(self.texts)

    @property
    def num_tokens(self) -> int:
        """The number of target tokens, text and end tokens: the N of beta = 1 / N."""
        return sum(map(len, self.targets))

    @property
    def main_language(self) -> str:
        """The most frequent language, "de" or "de-en"."""
        return max(sorted(set(self.languages)), key=self.languages.count)

    @property
    def source_languages(self) -> list[str]:
        """The most frequent language of every source."""
        rows: list[list[str]] = [[] for _ in range(max(self.sources) + 1)]
        for place, language in zip(self.sources, self.languages, strict=True):
            rows[place].append(language)
        return [max(sorted(set(one)), key=one.count) for one in rows]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the utterances of these indices, tokens padded to the longest of them."""
        rows = [(self.prompts[i], self.targets[i]) for i in indices]
        longest = max(len(prompt) + len(target) - 1 for prompt, target in rows)
        inputs = torch.full((len(rows), longest), self._end)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (prompt, target) in enumerate(rows):
            tokens = torch.tensor([*prompt, *target])
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
        sources = torch.tensor([self.sources[i] for i in indices])
        features = self.features[list(indices)]
        features = trim(features) if self._trim else features
        return Batch(features.float(), inputs, labels, sources=sources)


@dataclass(frozen=True)
class Encoded:
    """A row of `Examples`, all but its features."""

    text: str
    language: str
    word_languages: list[str]
    origin: str
    audio_path: str | None
    segment: tuple[float | None, float | None]
    source: int
    prompt: list[int]
    target: list[int]


def encode_row(row: Mapping[str, Any], path: str | None, encoder: Encoder) -> Encoded:
    """Return a row with the columns of `read_manifest`, tokenised.

    Args:
        row: all but its audio, if that is not at hand.
        path: of the audio, if it has one.
        encoder: of the model.

    Raises:
        BadRow: if the language is unknown to the tokenizer, or the transcript too long.
    """
    place = row.get("source", 0)
    try:
        with located(row["origin"]):
            language, prompt, target = encoder.encode(row["text"], row["language"])
            tags = [language_code(tag) for tag in row["word_languages"]]
    except BadRow as error:
        error.source = place
        raise
    segment = row["start"], row["end"]
    return Encoded(row["text"], language, tags, row["origin"], path, segment, place, prompt, target)


def _encode(dataset: Dataset, encoder: Encoder, on_bad: OnBadRow) -> dict[int, Encoded]:
    """Return the good rows by their numbers."""
    encoded = {}
    rows = zip(dataset.remove_columns("audio"), _audio_paths(dataset), strict=True)
    for number, (row, path) in enumerate(rows):
        try:
            encoded[number] = encode_row(row, path, encoder)
        except BadRow as error:
            on_bad(error)
    return encoded


def _audio_paths(dataset: Dataset) -> list[str | None]:
    """Return the paths of all audio, without the bytes that may lie beside them."""
    column = dataset.with_format("arrow")["audio"][:]
    return [path for chunk in column.chunks for path in chunk.field("path").to_pylist()]


def _check_left(bad: Sequence[BadRow], sources: Sequence[int]) -> None:
    """Refuse sources that have nothing but bad rows."""
    for place in sorted({error.source for error in bad} - set(sources)):
        raise UserError(all_bad([error for error in bad if error.source == place]))


def _fingerprint(*columns: Iterable[str]) -> str:
    total = sha256()
    for row in zip(*columns, strict=True):
        total.update(json.dumps(row).encode())
    return total.hexdigest()
