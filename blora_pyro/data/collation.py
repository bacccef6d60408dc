"""Examples, featurised and tokenised once, their batches, and the order in which they are drawn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Self

import torch
from datasets import Dataset
from torch import Tensor

from blora_pyro.data.features import Features, Heard, OnNote, OnProgress, load_features, trim
from blora_pyro.data.prompts import NO_MAP, NOTHING, EncodedRow, Encoder, Suppressed
from blora_pyro.data.rows import BadRow, BadRows, OnBadRow, all_bad, stop
from blora_pyro.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

IGNORED = -100  # the label that is no target, as cross-entropy's ignore_index


@dataclass(frozen=True, eq=False)
class _Tensors:
    def to(self, device: torch.device | str) -> Self:
        """Return all of it on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: one.to(device) for name, one in values.items() if hasattr(one, "to")}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class SoftTargets(_Tensors):
    """A teacher's distributions of the next token, for the student to stay near."""

    decoder_input_ids: Tensor  # (batch, tokens), int64
    log_probs: Tensor  # of the teacher's next token, (batch, tokens, vocabulary)
    is_target: Tensor  # which positions count, (batch, tokens), bool
    weight: float  # of the mean Kullback-Leibler divergence over these positions in the loss

    @property
    def num_tokens(self) -> int:
        """The number of positions that count."""
        return int(self.is_target.sum())


@dataclass(frozen=True, eq=False)
class Batch(_Tensors):
    """The model's input for one step.

    `labels[i, t]` is the token that follows `decoder_input_ids[i, t]`, or -100 where that is no
    target: inside the prompt and in the padding. Without labels the Pyro program samples tokens.
    `sources[i]` is the index of the utterance's source in a mixture, its domain; None is unknown.
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


class Examples:
    """A data set as features and token lists, n utterances; `batch` makes batches of it.

    Attributes:
        texts: the n transcripts.
        languages: the n languages that are spoken, by their codes, "de" or "de-en".
        written: the n languages of the transcripts: English where the task is to translate.
        word_languages: n lists of language codes, one for each token of the text, or empty.
        origins: where each row was read, such as "corpus/test.csv, line 7".
        audio_paths: n paths of audio files, None where a row's audio has none.
        segments: n pairs of seconds, start and end of the row in its audio; None is either end.
        sources: the index of each row's source in a mixture; 0 without one.
        prompts: n lists of token ids, the decoder's prompts.
        targets: n lists of token ids, text and end token; the prompts are never targets.
        features: log-mel spectrograms, as good as a tensor (n, mels, frames), float16 on the CPU.
        heard: what is known of their audio; None for the sample of a stream.
        fingerprint: a text that changes with the content of audio, segments, prompts or targets.
        is_drift: the texts are a model's own, see `against`.
    """

    is_drift = False

    def __init__(
        self,
        dataset: Dataset,
        feature_extractor: "WhisperFeatureExtractor",
        tokenizer: "PreTrainedTokenizerBase",
        task: str = "transcribe",
        max_tokens: int = 448,
        *,
        language: str | None = None,
        suppressed: Suppressed = NOTHING,
        language_map: Mapping[str, str] = NO_MAP,
        on_bad: OnBadRow = stop,
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
            language: of rows that name none, see `read_language`.
            suppressed: tokens that the model's `generate` never says.
            language_map: what prompts languages without a token, see `languages.prompt_codes`.
            on_bad: called with the error of every bad row: one whose audio cannot be read or is
                longer than the window, whose language is unknown to the tokenizer, or whose
                transcript is longer than the decoder. Where it does not raise, the row is left out.
            trim: cut every batch after its longest utterance, see `trim`.
            on_progress: called with the number of utterances featurised, and of all.
            on_note: called with one line if the cache cannot be written.

        Raises:
            UserError: with the row's origin, by `on_bad`; or if all rows of a source are bad.
        """
        bad = BadRows(on_bad)
        encoder = Encoder(tokenizer, language, task, max_tokens, suppressed, language_map)
        encoded = _encode(dataset, encoder, bad)
        numbers = list(encoded)
        features, heard = load_features(
            dataset if len(numbers) == len(dataset) else dataset.select(numbers),
            feature_extractor,
            on_bad=bad,
            on_progress=on_progress,
            on_note=on_note,
        )
        rows = [encoded[numbers[number]] for number in heard]
        self._keep(rows, features, list(heard.values()), encoder.end, trim)
        for source in sorted({error.source for error in bad} - set(self.sources)):
            raise UserError(all_bad([error for error in bad if error.source == source]))

    @classmethod
    def of_rows(
        cls, rows: Sequence[tuple[EncodedRow, Tensor]], end: int, trim: bool = False
    ) -> "Examples":
        """Return rows, one or more, that are tokenised and featurised already; see `Stream`.

        `end` is the tokenizer's end token; the fingerprint is that of texts and languages alone.
        """
        examples = cls.__new__(cls)
        mels, frames = rows[0][1].shape
        features = Features([(one[None], 0) for _, one in rows], (mels, frames))
        examples._keep([row for row, _ in rows], features, None, end, trim)
        return examples

    def _keep(
        self,
        rows: Sequence[EncodedRow],
        features: Features,
        heard: list[Heard] | None,
        end: int,
        trim: bool,
    ) -> None:
        self.features, self._end, self._trim = features, end, trim
        self.texts = [row.text for row in rows]
        self.languages = [row.language.code for row in rows]
        self.written = [row.written for row in rows]
        self.word_languages = [row.word_languages for row in rows]
        self.origins = [row.origin for row in rows]
        self.audio_paths = [row.audio_path for row in rows]
        self.segments = [row.segment for row in rows]
        self.sources = [row.source for row in rows]
        self.prompts = [row.prompt for row in rows]
        self.targets = [row.target for row in rows]
        total = sha256()
        self.heard = heard
        columns = [] if heard is None else [[one.content for one in heard]]
        prompted = [row.prompted_as for row in rows]
        languages = [
            spoken if spoken == token else f"{spoken}={token}"
            for spoken, token in zip(self.languages, prompted, strict=True)
        ]
        for values in zip(*columns, languages, self.texts, strict=True):
            total.update(json.dumps(values).encode())
        self.fingerprint = total.hexdigest()

    def against(self, texts: Sequence[str]) -> "Examples":
        """Return the same utterances with a model's own transcripts as references, to be scored.

        Errors then tell how far another model has drifted from it. Targets stay what they are.
        """
        examples = copy(self)
        examples.texts, examples.is_drift = list(texts), True
        return examples

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
        return _most_frequent(self.languages)

    @property
    def source_languages(self) -> list[str]:
        """The most frequent language of every source."""
        rows: list[list[str]] = [[] for _ in range(max(self.sources) + 1)]
        for source, language in zip(self.sources, self.languages, strict=True):
            rows[source].append(language)
        return [_most_frequent(one) for one in rows]

    def batch(self, indices: Sequence[int], full: bool = False) -> Batch:
        """Return the utterances of these indices, tokens padded to the longest of them.

        `full` windows are not trimmed in any case.
        """
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
        features = trim(features) if self._trim and not full else features
        return Batch(features.float(), inputs, labels, sources=sources)


def batch_indices(
    sources: Sequence[int],
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Iterator[list[int]]:
    """Yield endless batches of row numbers; their order depends on the arguments alone.

    Without weights: a fresh permutation of all rows every epoch, the last batch of an epoch kept
    short. With weights, one for each source and to any scale, every row of a batch is drawn from a
    source in proportion to its weight, and each source is gone through in fresh permutations of its
    own. `sources` holds the source of every row, from 0.

    Raises:
        UserError: if a source with a weight has no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    if weights is None:
        while True:
            for chosen in torch.randperm(len(sources), generator=generator).split(batch_size):
                yield chosen.tolist()
    rows = [[row for row, one in enumerate(sources) if one == s] for s in range(len(weights))]
    if not all(rows):
        raise UserError(f"source {rows.index([]) + 1} of data has no rows; leave it out")
    streams = [_permuted(one, generator) for one in rows]
    chances = torch.tensor(weights, dtype=torch.float64)
    while True:
        drawn = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
        yield [next(streams[source]) for source in drawn.tolist()]


def _permuted(rows: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for number in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[number]


def _encode(dataset: Dataset, encoder: Encoder, on_bad: OnBadRow) -> dict[int, EncodedRow]:
    """Return the good rows by their numbers."""
    # the paths without the bytes of audio that may lie beside them
    audio = dataset.with_format("arrow")["audio"][:]
    paths = [path for chunk in audio.chunks for path in chunk.field("path").to_pylist()]
    encoded = {}
    for number, (row, path) in enumerate(zip(dataset.remove_columns("audio"), paths, strict=True)):
        try:
            encoded[number] = encoder.encode_row(row, path)
        except BadRow as error:
            on_bad(error)
    return encoded


def _most_frequent(languages: Sequence[str]) -> str:
    return max(sorted(set(languages)), key=languages.count)
