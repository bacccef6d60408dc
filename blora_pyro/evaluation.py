"""Error rates of a Whisper on the new domain and on the backward sets, before and after a fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from blora_pyro.data import Examples
from blora_pyro.errors import UserError
from blora_pyro.metrics import (
    Counts,
    bootstrap_interval,
    cer_counts,
    macro_bootstrap_interval,
    macro_rate,
    mer_counts,
    normalize,
    pier_counts,
    wer_counts,
    words,
)
from blora_pyro.models import Base
from blora_pyro.transcription import transcribe_features

WITHOUT_SPACES = {"zh", "ja", "yue", "th", "lo", "my"}  # languages scored by CER


@dataclass(frozen=True)
class Evaluation:
    """One set's hypotheses and edit counts.

    Attributes:
        metric: The main measure: `wer`, `mer` (code-switched with Chinese) or `cer` (Chinese).
        counts: Measure -> edit counts per utterance; `cer` always, `pier` if code-switched.
        references: Normalised transcripts.
        hypotheses: Normalised output.
    """

    metric: str
    counts: Mapping[str, Counts]
    references: list[str]
    hypotheses: list[str]

    @property
    def main(self) -> Counts:
        """Counts of the main measure."""
        return self.counts[self.metric]

    def summary(self) -> dict[str, object]:
        """Rates as fractions with 95% bootstrap intervals over utterances, for JSON."""
        rates = {
            name: {"rate": counts.rate, "interval": list(bootstrap_interval(counts))}
            for name, counts in self.counts.items()
        }
        return {"metric": self.metric, "utterances": len(self.references), **rates}


def _tagged(text: str, languages: list[str]) -> tuple[str, list[str]]:
    """A normalised transcript, and the language of each of *its* tokens."""
    if len(tokens := words(text)) != len(languages):
        raise UserError(
            f"{text[:40]!r} has {len(tokens)} words but {len(languages)} word_languages; "
            "give one for each word"
        )
    kept = [
        (part, language)
        for token, language in zip(tokens, languages, strict=True)
        for part in words(normalize(token))
    ]
    return " ".join(part for part, _ in kept), [language for _, language in kept]


def score(examples: Examples, hypotheses: list[str]) -> Evaluation:
    """Edit counts of `hypotheses`, after basic normalisation of both sides."""
    codes = examples.main_language.split("-")
    references = [normalize(text) for text in examples.texts]
    guesses = [normalize(text) for text in hypotheses]
    counts = {"cer": cer_counts(references, guesses)}
    if len(codes) == 1 and codes[0] in WITHOUT_SPACES:
        return Evaluation("cer", counts, references, guesses)
    metric = "mer" if WITHOUT_SPACES & set(codes) else "wer"
    count = mer_counts if metric == "mer" else wer_counts
    counts = {metric: count(references, guesses)} | counts
    if len(codes) > 1 and all(examples.word_languages):
        tagged = [
            _tagged(text, tags)
            for text, tags in zip(examples.texts, examples.word_languages, strict=True)
        ]
        texts, tags = [text for text, _ in tagged], [tags for _, tags in tagged]
        pier = pier_counts(texts, guesses, tags, codes[1])
        if len(pier.lengths):  # else no utterance mixes the languages
            counts["pier"] = pier
    return Evaluation(metric, counts, references, guesses)


def evaluate(base: Base, examples: Examples) -> Evaluation:
    """Transcribe and score one set."""
    return score(examples, transcribe_features(base, examples.features, examples.prompts))


def macro_summary(sets: list[Evaluation]) -> dict[str, object]:
    """The backward error: macro-average of the sets' main rates, with its 95% interval."""
    counts = [one.main for one in sets]
    return {"rate": macro_rate(counts), "interval": list(macro_bootstrap_interval(counts))}
