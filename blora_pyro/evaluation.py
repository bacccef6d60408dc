"""Error rates of a Whisper model on a data set, of raw and of normalised texts."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blora_pyro.data import Examples
from blora_pyro.languages import Language, is_unspaced
from blora_pyro.metrics import (
    Counts,
    cer_counts,
    check_tags,
    mer_counts,
    pier_counts,
    points_of_interest,
    spans,
    wer_counts,
)
from blora_pyro.metrics.bootstrap import (
    macro_bootstrap_interval,
    macro_rate,
    paired_macro_bootstrap,
)
from blora_pyro.metrics.normalizers import NORMALIZERS, Normalizer
from blora_pyro.models import Base
from blora_pyro.models.encoder_states import last_states
from blora_pyro.transcription import transcribe_features
from blora_pyro.transcription.safeguards import is_loop

TAG_CHARACTERS, PRIVATE_USE = range(0xE0020, 0xE0080), range(0xF0000, 0x10FFFE)
COUNTERS = {"wer": wer_counts, "mer": mer_counts, "cer": cer_counts}


@dataclass(frozen=True)
class Evaluation:
    """Hypotheses and edit counts of one data set.

    Attributes:
        metric: The main measure: `wer`, `mer` or `cer`, see `main_measure`.
        counts: Measure -> edit counts per utterance; always `cer`, and `pier` if code-switched.
        references: Normalised references.
        hypotheses: Normalised hypotheses.
        points: Per utterance, which tokens of the reference PIER counts; [] if it counts none.
        raw: The evaluation of the raw texts; None in the raw one itself.
        examples: Fingerprint of the data set, see `Examples`; "" is not known.
        is_drift: The references are the base's own transcripts, see `Examples.against`.
    """

    metric: str
    counts: Mapping[str, Counts]
    references: list[str]
    hypotheses: list[str]
    points: list[list[bool]]
    raw: "Evaluation | None" = None
    examples: str = ""
    is_drift: bool = False

    @property
    def main(self) -> Counts:
        """Counts of the main measure."""
        return self.counts[self.metric]

    @property
    def loops(self) -> int:
        """The number of hypotheses that repeat themselves, as they were before normalising."""
        return sum(map(is_loop, (self.raw or self).hypotheses))

    def summary(self) -> dict[str, object]:
        """Rates as fractions with 95% bootstrap intervals over utterances, for JSON.

        `length` is that of all references in the main measure: words, of CER characters.
        """
        rates = {name: rate_summary([self], name) for name in self.counts}
        length = int(self.main.lengths.sum())
        about = {"utterances": len(self.references), "length": length, "loops": self.loops}
        return {"metric": self.metric, **about, **rates}


def rate_summary(sets: Sequence[Evaluation], measure: str | None = None) -> dict[str, Any]:
    """Macro-averaged rate of the sets with its 95% interval, and under `raw` that of raw texts.

    None as the measure is the main one of each set.
    """
    summary = rate_of([one.counts[measure or one.metric] for one in sets])
    raw = _raws(sets)
    return summary | ({"raw": rate_summary(raw, measure)} if raw else {})


def rate_of(sets: Sequence[Counts]) -> dict[str, Any]:
    """Macro-averaged rate of counts with its 95% interval, for JSON."""
    rate, (low, high) = macro_rate(sets), macro_bootstrap_interval(sets)
    return {"rate": _number(rate), "interval": [_number(low), _number(high)]}


def change_summary(
    before: Sequence[Evaluation], after: Sequence[Evaluation], measure: str | None = None
) -> dict[str, Any]:
    """Rate after minus rate before, with its paired interval; arguments as in `rate_summary`."""
    counts, others = (
        [one.counts[measure or one.metric] for one in side] for side in (before, after)
    )
    summary = change_of(counts, others)
    raw, other = _raws(before), _raws(after)
    return summary | ({"raw": change_summary(raw, other, measure)} if raw else {})


def change_of(before: Sequence[Counts], after: Sequence[Counts]) -> dict[str, Any]:
    """Macro-averaged rate after minus before of the same utterances, with its paired interval."""
    difference, low, high = paired_macro_bootstrap(before, after)
    return {"difference": _number(difference), "interval": [_number(low), _number(high)]}


def _raws(sets: Sequence[Evaluation]) -> list[Evaluation]:
    return [one.raw for one in sets if one.raw is not None]


def _number(value: float) -> float | None:
    """The value, or None for NaN (the rate without reference tokens), which JSON lacks."""
    return None if math.isnan(value) else value


def main_measure(texts: Sequence[str], languages: Sequence[Language]) -> str:
    """The main measure of a set, by the languages and the scripts of its texts.

    `cer` if all utterances are in languages without spaces, `mer` if some are, or hold a script
    without spaces, otherwise `wer`. Where the language is unknown the text decides alone.
    """
    unspaced: set[bool] = set()
    for text, language in zip(texts, languages, strict=True):
        by_script = is_unspaced(text)
        unspaced |= {*(language.unspaced or (by_script,)), *([True] if by_script else [])}
    return "mer" if len(unspaced) > 1 else "cer" if unspaced == {True} else "wer"


def score(
    examples: Examples, hypotheses: list[str], normalizer: Normalizer | None = None
) -> Evaluation:
    """Count edits of `hypotheses`, one per example, raw and normalised.

    None as the normalizer is the default one.

    Raises:
        UserError: If an utterance's words and word_languages differ in number.
    """
    metric = main_measure(examples.texts, examples.written)
    raw = _score(metric, examples, hypotheses, Normalizer("none"))
    return _score(metric, examples, hypotheses, normalizer or Normalizer(), raw)


def _score(
    metric: str,
    examples: Examples,
    hypotheses: list[str],
    normalizer: Normalizer,
    raw: Evaluation | None = None,
) -> Evaluation:
    references, guesses = (
        [normalizer(text, one.code) for text, one in zip(texts, examples.written, strict=True)]
        for texts in (examples.texts, hypotheses)
    )
    spoken = [row for row, text in enumerate(examples.texts) if text.strip()]
    switched = [row for row in spoken if len(examples.written[row].codes) > 1]
    tags: dict[int, list[str]] = {}
    for row in switched if all(examples.word_languages[row] for row in switched) else []:
        normalize = partial(normalizer, language=examples.written[row].code)
        given = examples.texts[row], examples.word_languages[row]
        references[row], tags[row] = _normalize_tagged(metric, *given, normalize)
    counts = {name: COUNTERS[name](references, guesses) for name in dict.fromkeys((metric, "cer"))}
    embedded = {row: examples.written[row].codes[1] for row in tags}
    texts = [references[row] for row in tags], [guesses[row] for row in tags]
    pier = pier_counts(*texts, [*tags.values()], [*embedded.values()], metric)
    if len(pier.lengths):  # else no utterance mixes the languages
        counts["pier"] = pier
    points: list[list[bool]] = [[] for _ in references]
    for row, languages in tags.items():
        points[row] = points_of_interest(languages, embedded[row])
    return Evaluation(metric, counts, references, guesses, points, raw)


def _normalize_tagged(
    measure: str, text: str, languages: Sequence[str], normalize: Callable[[str], str]
) -> tuple[str, list[str]]:
    """The normalised transcript and the language of each of its tokens, of those of the raw one.

    The measure decides what a token is, see `metrics.spans`.

    A normaliser may split a word, drop it, or drop several at once (text in brackets). So each word
    is preceded by a marker, a character that normalisers keep, and text between two markers has the
    language of the first. The markers are Unicode tag characters, because lower-casing Σ to ς or σ
    depends on the letters next to it and skips these characters.
    """
    check_tags(text, languages)
    text = " ".join(text.split())
    starts = [start for start, _ in spans("mer", text)]
    candidates = map(chr, itertools.chain(TAG_CHARACTERS, PRIVATE_USE))
    free = (mark for mark in candidates if mark not in text)
    marks = dict(zip(dict.fromkeys(languages), free, strict=False))
    parts = [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]
    marked = "".join(marks[code] + part for code, part in zip(languages, parts, strict=True))
    codes = {mark: code for code, mark in marks.items()}
    spelled, owners, owner = "", [], ""
    for char in normalize(marked):
        owner = codes.get(char, owner)
        if char not in codes:
            spelled += char
            owners.append(owner)
    found = [owners[start] for start, _ in spans(measure, spelled)]
    return " ".join(spelled.split()), found


def normalizer_for(base: Base, name: str) -> Normalizer:
    """A normaliser with the spellings of the base's checkpoint."""
    return Normalizer(name, base.tokenizer.english_spelling_normalizer)


def transcribe_examples(
    base: Base,
    examples: Examples,
    shares_encoder: bool = False,
    on_done: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """Transcribe a set; the encoder, if it is not adapted, hears it once in a process."""
    encoder = None
    if shares_encoder:
        encoder = partial(last_states, base.net, examples.fingerprint, examples.features)
    return transcribe_features(
        base, examples.features, examples.prompts, encoder=encoder, on_done=on_done
    )


def evaluate(
    base: Base,
    examples: Examples,
    normalizer: str = NORMALIZERS[0],
    shares_encoder: bool = False,
) -> Evaluation:
    """Transcribe and score one set; see `transcribe_examples`."""
    hypotheses = transcribe_examples(base, examples, shares_encoder)
    return score(examples, hypotheses, normalizer_for(base, normalizer))
