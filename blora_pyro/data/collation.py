"""Examples in memory, featurised and tokenised once, and the batches made of them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import Tensor

from blora_pyro.data.audio import SAMPLING_RATE, audio_name, read_audio
from blora_pyro.data.messages import located
from blora_pyro.data.prompts import end_id, prompt_ids, text_ids
from blora_pyro.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

IGNORED = -100  # the label that is no target, as cross-entropy's ignore_index
CHUNK = 32  # utterances featurised at a time
_MAX_CHARACTERS = 100  # a token; longer texts are not worth tokenising


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model takes for one step.

    `labels[i, t]` is the token that follows `decoder_input_ids[i, t]`, or -100 where that is no
    target: inside the prompt and in the padding. Without labels the Pyro program samples tokens.
    """

    input_features: Tensor  # (batch, mels, frames), float32
    decoder_input_ids: Tensor  # (batch, tokens), int64
    labels: Tensor | None  # (batch, tokens), int64

    @property
    def num_tokens(self) -> int:
        """The number of target tokens; every position counts in a batch without labels."""
        if self.labels is None:
            return self.decoder_input_ids.numel()
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.input_features.to(device), self.decoder_input_ids.to(device), labels)


class Examples:
    """A data set as tensors and token lists, n utterances; `batch` makes batches of it.

    Attributes:
        texts: the n transcripts.
        languages: the n languages, "de" or "de-en".
        word_languages: n lists of language codes, one for each token of the text, or empty.
        sources: n places, each of the row's source in a mixture; 0 without one.
        prompts: n lists of token ids, the decoder's prompts.
        targets: n lists of token ids, text and end token; the prompts are never targets.
        features: log-mel spectrograms, (n, mels, frames), float16 on the CPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        feature_extractor: "WhisperFeatureExtractor",
        tokenizer: "PreTrainedTokenizerBase",
        task: str = "transcribe",
        max_tokens: int = 448,
    ) -> None:
        """Read, featurise and tokenise everything.

        Args:
            dataset: with the columns of `read_manifest`.
            feature_extractor: the model's; its window is the longest audio allowed.
            tokenizer: the model's.
            task: "transcribe" or "translate".
            max_tokens: the decoder's length, the model's `max_target_positions`.

        Raises:
            UserError: with the row's origin, if its audio cannot be read or is longer than the
                window, its language is unknown to the tokenizer, or its transcript is longer than
                the decoder.
        """
        self.texts: list[str] = list(dataset["text"])
        self.languages: list[str] = list(dataset["language"])
        self.word_languages: list[list[str]] = list(dataset["word_languages"])
        mixed = "source" in dataset.column_names
        self.sources: list[int] = list(dataset["source"]) if mixed else [0] * len(dataset)
        self._end = end_id(tokenizer)
        prompts: dict[str, list[int]] = {}
        self.prompts: list[list[int]] = []
        self.targets: list[list[int]] = []
        for text, code, origin in zip(self.texts, self.languages, dataset["origin"], strict=True):
            with located(origin):
                if code not in prompts:
                    prompts[code] = prompt_ids(tokenizer, code, task)
                self.prompts.append(prompts[code])
                self.targets.append(self._target(tokenizer, text, max_tokens - len(prompts[code])))
        self.features = featurise(_waves(dataset, feature_extractor), feature_extractor)

    def _target(self, tokenizer: "PreTrainedTokenizerBase", text: str, room: int) -> list[int]:
        """Return the tokens of a text and its end, no more than fit behind the prompt."""
        size = f"{len(text):,} characters"
        if len(text) <= _MAX_CHARACTERS * max(room, 1):
            target = [*text_ids(tokenizer, text), self._end]
            if len(target) - 1 <= room:  # the end is never an input
                return target
            size = f"{len(target) - 1} tokens"
        raise UserError(
            f"the text ({text[:30]!r}...) has {size}, but behind its prompt the decoder has room "
            f"for {room} tokens; shorten the text or split the audio"
        )

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

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the utterances of these indices, padded to the longest of them."""
        rows = [(self.prompts[i], self.targets[i]) for i in indices]
        longest = max(len(prompt) + len(target) - 1 for prompt, target in rows)
        inputs = torch.full((len(rows), longest), self._end)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (prompt, target) in enumerate(rows):
            tokens = torch.tensor([*prompt, *target])
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
        return Batch(self.features[list(indices)].float(), inputs, labels)


def _waves(
    dataset: Dataset, feature_extractor: "WhisperFeatureExtractor"
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield names that tell the row too, and samples, of audio no longer than the window."""
    for row in dataset.select_columns(["audio", "start", "end", "origin"]):
        with located(row["origin"]):
            audio = row["audio"] or {}
            wave = read_audio(
                audio,
                start=row["start"],
                end=row["end"],
                max_seconds=feature_extractor.chunk_length,
            )
        yield f"{row['origin']}: {audio_name(audio)}", wave


def featurise(
    waves: Iterable[tuple[str, npt.NDArray[np.float32]]],
    feature_extractor: "WhisperFeatureExtractor",
) -> Tensor:
    """Return log-mel spectrograms, (n, mels, frames), float16: half the memory of float32.

    Args:
        waves: names (for messages) and samples, (samples,) at 16 kHz.
        feature_extractor: the model's; its window is the longest audio allowed.

    Raises:
        UserError: if audio is longer than the window.
    """
    features = []
    waves = iter(waves)
    while chunk := list(itertools.islice(waves, CHUNK)):
        for name, wave in chunk:
            if len(wave) > feature_extractor.n_samples:
                raise UserError(
                    f"{name} lasts {len(wave) / SAMPLING_RATE:.2f} s, but the model "
                    f"hears {feature_extractor.chunk_length} s at a time; split it"
                )
        out = feature_extractor(
            [wave for _, wave in chunk], sampling_rate=SAMPLING_RATE, return_tensors="np"
        )
        features.append(torch.from_numpy(out["input_features"]).half())
    return torch.cat(features)
