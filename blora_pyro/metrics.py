"""Error rates for code-switched speech, their bootstrap intervals, and what an adapter cost.

Every error rate here is kept as per-utterance counts (`Counts`), so that it pools over a corpus and
bootstraps over utterances. All alignments are jiwer's. Rates are fractions: 0.12 is 12%.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# The Unicode script Han: radicals, 々 〇 and the Hangzhou numerals, Extension A, the unified block,
# compatibility ideographs, and planes 2 and 3, which Unicode keeps for Han (Extensions B onwards).
_HAN = (
    r"\u2e80-\u2e99\u2e9b-\u2ef3\u2f00-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufa6d\ufa70-\ufad9"
    r"\U00016fe2-\U00016fe3\U00016ff0-\U00016ff6\U00020000-\U0003fffd"
)
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_TOKEN = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")


@dataclass(frozen=True, eq=False)
class Counts:
    """Edits (substitutions + deletions + insertions) and reference lengths of n utterances.

    Both have shape (n,); for PIER the lengths are numbers of points of interest.
    """

    edits: IntArray
    lengths: IntArray

    @property
    def rate(self) -> float:
        """The pooled rate, sum(edits) / sum(lengths); nan where no reference has a token."""
        total = int(self.lengths.sum())
        return int(self.edits.sum()) / total if total else float("nan")


def words(text: str) -> list[str]:
    """Split mixed-script text: each Han character alone, everything else at white space.

    Text without Han gives `text.split()`. "我喜欢red bicycle" gives 我, 喜, 欢, red, bicycle.
    """
    return _TOKEN.findall(text)


def normalize(text: str) -> str:
    """Return the text in NFKC, lower case, without punctuation and symbols, white space collapsed.

    Apostrophes inside words stay (as "'"), but not beside Han, where they are quotation marks.
    Other punctuation becomes a space: "e-mail" is two words afterwards. Combining marks stay, since
    many scripts spell with them. Whisper's own normalisers (numbers, spelling, contractions) are
    not this function; they come by another way later.
    """
    # Lower-casing can undo the composition ("H̱" has no single character, "ẖ" has): compose again.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = text.replace("\u2019", "'").replace("\u02bc", "'")  # the typographic apostrophes
    kept = (char if _spells(text, place) else " " for place, char in enumerate(text))
    return " ".join("".join(kept).split())


def _spells(text: str, place: int) -> bool:
    if text[place] != "'":
        return unicodedata.category(text[place])[0] not in "PS"
    around = text[max(place - 1, 0) : place] + text[place + 1 : place + 2]
    letters = [c for c in around if unicodedata.category(c)[0] in "LMN"]
    return len(letters) == 2 and not _HAN_CHARACTER.search(around)


def wer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count word errors, words being split at white space.

    Takes n texts each and returns Counts of n utterances, whose `rate` is WER = (S + D + I) / N.
    An empty reference counts the hypothesis's words as insertions.

    Raises:
        ValueError: if the numbers of texts differ, or a text is given where a list is wanted.
    """
    _check_sizes(references=references, hypotheses=hypotheses)
    output = _align([r.split() for r in references], [h.split() for h in hypotheses])
    return _count(output, len(references))


def mer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count mixed errors: one alignment over Han characters and whole words of other scripts.

    The mixed error rate (MER) of code-switching work, not `jiwer.mer`, the match error rate.
    Without Han it equals WER. Otherwise as `wer_counts`.
    """
    _check_sizes(references=references, hypotheses=hypotheses)
    output = _align([words(r) for r in references], [words(h) for h in hypotheses])
    return _count(output, len(references))


def cer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count character errors as jiwer does, inner spaces being characters.

    Where a reference has Han characters, white space is dropped from it and its hypothesis; the
    reference alone decides, so that every system is counted alike. Otherwise as `wer_counts`.
    """
    _check_sizes(references=references, hypotheses=hypotheses)
    pairs = [
        ("".join(r.split()), "".join(h.split())) if _HAN_CHARACTER.search(r) else (r, h)
        for r, h in zip(references, hypotheses, strict=True)
    ]
    output = jiwer.process_characters([r for r, _ in pairs], [h for _, h in pairs])
    return _count(output, len(references))


def pier_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    word_languages: Sequence[Sequence[str]],
    embedded: str | Sequence[str],
) -> Counts:
    """Count the errors at points of interest: the words of the embedded language.

    PIER (arXiv 2501.09512): in the word alignment (over `words`), count the edits whose reference
    word is a point of interest, divided by the number of such words. An insertion counts for the
    reference word that it stands before, trailing ones for the last word, so PIER may exceed 100%.

    `word_languages` holds, for each of n utterances, a code for each token of `words(reference)`;
    `embedded` is one code for the corpus or one per utterance. Returns Counts of the m <= n
    utterances with both points of interest and other words: those of two systems stay paired.

    Raises:
        ValueError: if numbers of utterances differ, or an utterance's words and languages do.
    """
    languages = [embedded] * len(references) if isinstance(embedded, str) else embedded
    columns = {"word_languages": word_languages, "embedded": languages}
    _check_sizes(references=references, hypotheses=hypotheses, **columns)
    output = _align([words(r) for r in references], [words(h) for h in hypotheses])
    rows = []
    for index, codes in enumerate(word_languages):
        length = len(output.references[index])
        if len(codes) != length:
            raise ValueError(
                f"utterance {index}: {len(codes)} word languages for {length} reference words; "
                "give one language code for each token of words(reference)"
            )
        points = np.array([code == languages[index] for code in codes], dtype=bool)
        if points.any() and not points.all():
            charged = _charge(output.alignments[index], length)
            charged[-2] += charged[-1]  # trailing insertions count for the last word
            rows.append((charged[:-1][points].sum(), points.sum()))
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Counts(table[:, 0], table[:, 1])


def _check_sizes(**columns: Sequence[Any]) -> None:
    for name, column in columns.items():
        if isinstance(column, str):  # a text is a sequence too, of one-character utterances
            raise ValueError(f"{name} must be a list with one entry per utterance, not one text")
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"got {sizes}; give one of each per utterance")


def _align(references: list[list[str]], hypotheses: list[list[str]]) -> jiwer.WordOutput:
    # Joined by single spaces, since jiwer would not split at a lone tab or no-break space.
    return jiwer.process_words([" ".join(r) for r in references], [" ".join(h) for h in hypotheses])


def _count(output: jiwer.WordOutput | jiwer.CharacterOutput, n: int) -> Counts:
    # Only the first n, since jiwer makes one empty utterance out of none.
    lengths = np.array([len(reference) for reference in output.references[:n]], dtype=np.int64)
    edits = [_charge(output.alignments[i], length).sum() for i, length in enumerate(lengths)]
    return Counts(np.array(edits, dtype=np.int64), lengths)


def _charge(chunks: list[jiwer.AlignmentChunk], length: int) -> IntArray:
    """Return edits by reference word, shape (length + 1,); the last are trailing insertions."""
    charged = np.zeros(length + 1, dtype=np.int64)
    for chunk in chunks:
        if chunk.type == "insert":
            charged[chunk.ref_start_idx] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            charged[chunk.ref_start_idx : chunk.ref_end_idx] += 1
    return charged


def macro_rate(sets: Sequence[Counts]) -> float:
    """Return the mean of the sets' pooled rates; of the held-out sets it is the backward error."""
    return sum(counts.rate for counts in sets) / len(sets) if sets else float("nan")


def bootstrap_interval(
    counts: Counts, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of the pooled rate, resampling utterances.

    Draws in which no reference has a token are dropped; (nan, nan) where none is left.

    Raises:
        ValueError: if `level` is not between 0 and 1, or `draws` is below 1.
    """
    return macro_bootstrap_interval([counts], level, draws, seed)


def macro_bootstrap_interval(
    sets: Sequence[Counts], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of `macro_rate`, each set's utterances resampled on their own.

    As `bootstrap_interval`; also raises ValueError if there is no set.
    """
    if not sets:
        raise ValueError("got no set of counts; give at least one to average over")
    rng = np.random.default_rng(seed)
    rates = [_resampled_rates([counts], draws, rng)[0] for counts in sets]
    return _interval(np.mean(rates, axis=0), level)


def paired_bootstrap(
    counts_a: Counts, counts_b: Counts, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Compare two systems on the same utterances.

    Returns (difference, low, high): rate(b) - rate(a), and its percentile interval over draws in
    which both systems are seen on the same resampled utterances.

    Raises:
        ValueError: if the numbers of utterances differ, and as `bootstrap_interval` does.
    """
    return paired_macro_bootstrap([counts_a], [counts_b], level, draws, seed)


def paired_macro_bootstrap(
    sets_a: Sequence[Counts],
    sets_b: Sequence[Counts],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Compare the macro-averages of two systems over the same sets, such as backward errors.

    Returns (difference, low, high): macro_rate(b) - macro_rate(a) and its percentile interval, each
    set's utterances resampled on their own, for both systems alike. With a = base it is forgetting.

    Raises:
        ValueError: as `paired_bootstrap`, or if there is no set.
    """
    sizes_a, sizes_b = ([len(counts.edits) for counts in sets] for sets in (sets_a, sets_b))
    if sizes_a != sizes_b or not sizes_a:
        raise ValueError(f"got sets of {sizes_a} and {sizes_b} utterances; give the same ones")
    rng = np.random.default_rng(seed)
    pairs = [_resampled_rates([a, b], draws, rng) for a, b in zip(sets_a, sets_b, strict=True)]
    rates = np.mean(pairs, axis=0)
    return macro_rate(sets_b) - macro_rate(sets_a), *_interval(rates[1] - rates[0], level)


def _resampled_rates(systems: list[Counts], draws: int, rng: np.random.Generator) -> FloatArray:
    """Return pooled rates, shape (systems, draws), all systems on the same resampled utterances."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    table = np.stack([[counts.edits, counts.lengths] for counts in systems])  # (systems, 2, n)
    n = table.shape[-1]
    totals = np.zeros((len(systems), 2, draws))
    # One draw at a time: all at once would hold draws x n indices, gigabytes for a large corpus.
    for draw in range(draws):
        weights = np.bincount(rng.integers(n, size=n), minlength=n)
        totals[:, :, draw] = table @ weights
    edits, lengths = totals[:, 0], totals[:, 1]
    return np.divide(edits, lengths, out=np.full_like(edits, np.nan), where=lengths > 0)


def _interval(values: FloatArray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; 0.95 is usual")
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def backward_gain(lora: float, blora: float) -> float:
    """Return (lora - blora) / lora of the backward errors; nan where LoRA's is 0."""
    return (lora - blora) / lora if lora else float("nan")


def new_domain_drop(lora: float, blora: float) -> float:
    """Return (blora - lora) / lora of the new-domain errors; nan where LoRA's is 0."""
    return (blora - lora) / lora if lora else float("nan")


def forgetting(method: float, base: float) -> float:
    """Return method - base of the backward errors: absolute, negative where the method helps."""
    return method - base


def forgetting_removed(lora: float, blora: float, base: float) -> float:
    """Return 1 - forgetting(blora) / forgetting(lora), from the three backward errors.

    nan where LoRA forgets nothing (lora <= base): there is nothing to remove.
    """
    forgotten = forgetting(lora, base)
    return 1 - forgetting(blora, base) / forgotten if forgotten > 0 else float("nan")


def sparsity(arrays: Iterable[npt.ArrayLike], threshold: float = 1e-3) -> float:
    """Return the share of elements with |w| < threshold, pooled over arrays of any shapes.

    Takes what `np.asarray` takes (torch tensors: detached, on the CPU, not bfloat16); nan of none.
    """
    small = total = 0
    for array in arrays:
        values = np.asarray(array)
        small += int((np.abs(values) < threshold).sum())
        total += values.size
    return small / total if total else float("nan")
