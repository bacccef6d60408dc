"""Error rates for code-switched speech, their alignments, and measures of forgetting.

Every error rate is kept as per-utterance counts (`Counts`), so that it can be pooled over a corpus
and bootstrapped over utterances. All alignments are jiwer's. Rates are fractions: 0.12 is 12%.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import jiwer
import numpy as np
import numpy.typing as npt
import regex

from blora_pyro.errors import UserError
from blora_pyro.languages import UNSPACED, is_unspaced

IntArray = npt.NDArray[np.int64]

# The sound marks of kana belong to no script.
_TOKEN = regex.compile(rf"[{UNSPACED}][\p{{M}}ﾞﾟ]*|[^\s{UNSPACED}]+")
_WORD = regex.compile(r"\S+")
_OPERATIONS = {"equal": "=", "substitute": "S", "delete": "D", "insert": "I"}


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


class Aligned(NamedTuple):
    """A step of an alignment: tokens of reference and hypothesis, "" where one has none."""

    operation: str  # "=", or an edit: "S" (substitution), "D" (deletion), "I" (insertion)
    reference: str
    hypothesis: str
    # Index of the reference token that an edit counts for; for an insertion the token after it, or
    # the last one (-1 if there is none).
    position: int


def words(text: str) -> list[str]:
    """Split mixed-script text: each character of a script without spaces alone, the rest at spaces.

    Those scripts are `languages.UNSPACED_SCRIPTS`; combining marks stay with their character. Other
    text gives `text.split()`. "我喜欢red bicycle" gives 我, 喜, 欢, red, bicycle.
    """
    return _TOKEN.findall(" ".join(text.split()))


def spans(measure: str, text: str) -> list[tuple[int, int]]:
    """Start and end of each token of `wer` or `mer`, in a text with single spaces only."""
    return [match.span() for match in (_WORD if measure == "wer" else _TOKEN).finditer(text)]


def wer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count word errors, words being split at white space.

    Takes n texts each and returns Counts of n utterances, whose `rate` is WER = (S + D + I) / N.
    An empty reference counts the hypothesis's words as insertions.

    Raises:
        ValueError: if the numbers of texts differ, or a text is given where a list is wanted.
    """
    return _count("wer", references, hypotheses)


def mer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count mixed errors: one alignment over the tokens of `words`.

    The mixed error rate (MER) of code-switching work, not `jiwer.mer`, the match error rate.
    Without Han and the like it equals WER. Otherwise as `wer_counts`.
    """
    return _count("mer", references, hypotheses)


def cer_counts(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Count character errors as jiwer does, inner spaces being characters.

    Where a reference has a script without spaces (see `words`), white space is dropped from it and
    its hypothesis; the reference alone decides, so that every system is counted alike. Otherwise as
    `wer_counts`.
    """
    return _count("cer", references, hypotheses)


def align(measure: str, reference: str, hypothesis: str) -> list[Aligned]:
    """The alignment of two texts by which `wer`, `mer` or `cer` counts edits."""
    return _steps(_output(measure, [reference], [hypothesis]), 0)


def _steps(output: jiwer.WordOutput | jiwer.CharacterOutput, index: int) -> list[Aligned]:
    wanted, got = list(output.references[index]), list(output.hypotheses[index])
    steps = []
    for chunk in output.alignments[index]:
        kind, last = _OPERATIONS[chunk.type], min(chunk.ref_start_idx, len(wanted) - 1)
        places = range(chunk.ref_start_idx, chunk.ref_end_idx)
        others = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        for place, other in zip_longest(places, others):
            token = "" if place is None else wanted[place]
            guess = "" if other is None else got[other]
            steps.append(Aligned(kind, token, guess, last if place is None else place))
    return steps


def check_tags(text: str, word_languages: Sequence[str]) -> None:
    """Check that there is one language per word, or none at all.

    Raises:
        UserError: If the numbers differ.
    """
    if word_languages and (count := len(words(text))) != len(word_languages):
        raise UserError(
            f"{text[:40]!r} has {count} words but {len(word_languages)} word_languages; "
            "give one for each word"
        )


def points_of_interest(word_languages: Sequence[str], embedded: str) -> list[bool]:
    """Which tokens of a reference PIER counts; [] for an utterance that it skips.

    PIER skips utterances that have no points of interest, or only such.
    """
    points = [code == embedded for code in word_languages]
    return points if any(points) and not all(points) else []


def pier_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    word_languages: Sequence[Sequence[str]],
    embedded: str | Sequence[str],
    measure: str = "mer",
) -> Counts:
    """Count the errors at points of interest: the words of the embedded language.

    PIER (arXiv 2501.09512): in the alignment of `measure`, count the edits whose reference word is
    a point of interest, divided by the number of such words. An insertion counts for the reference
    word after it, trailing ones for the last word, so PIER may exceed 100%.

    `word_languages` holds, for each of n utterances, a code for each token of the reference
    (`words` for "mer", `str.split` for "wer"); `embedded` is one code for the corpus or one per
    utterance. Returns Counts of the m <= n utterances with both points of interest and other words:
    those of two systems stay paired.

    Raises:
        ValueError: if numbers of utterances differ, or an utterance's words and languages do.
    """
    languages = [embedded] * len(references) if isinstance(embedded, str) else embedded
    columns = {"word_languages": word_languages, "embedded": languages}
    _check_sizes(references=references, hypotheses=hypotheses, **columns)
    output = _output(measure, references, hypotheses)
    rows = []
    for index, codes in enumerate(word_languages):
        length = len(output.references[index])
        if len(codes) != length:
            raise ValueError(
                f"utterance {index}: {len(codes)} word languages for {length} reference words; "
                "give one language code for each token of words(reference)"
            )
        if points := points_of_interest(codes, languages[index]):
            edits = [one.position for one in _steps(output, index) if one.operation != "="]
            rows.append((sum(points[position] for position in edits), sum(points)))
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Counts(table[:, 0], table[:, 1])


def _check_sizes(**columns: Sequence[Any]) -> None:
    for name, column in columns.items():
        if isinstance(column, str):  # a text is a sequence too, of one-character utterances
            raise ValueError(f"{name} must be a list with one entry per utterance, not one text")
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"got {sizes}; give one of each per utterance")


def _output(
    measure: str, references: Sequence[str], hypotheses: Sequence[str]
) -> jiwer.WordOutput | jiwer.CharacterOutput:
    """Align n utterances with jiwer."""
    _check_sizes(references=references, hypotheses=hypotheses)
    if measure == "cer":
        pairs = [
            ("".join(r.split()), "".join(h.split())) if is_unspaced(r) else (r, h)
            for r, h in zip(references, hypotheses, strict=True)
        ]
        return jiwer.process_characters([r for r, _ in pairs], [h for _, h in pairs])
    split = words if measure == "mer" else str.split
    # Joined by single spaces, since jiwer would not split at a lone tab or no-break space.
    sides = [[" ".join(split(text)) for text in texts] for texts in (references, hypotheses)]
    return jiwer.process_words(*sides)


def _count(measure: str, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    output = _output(measure, references, hypotheses)
    # Only the first n, since jiwer makes one empty utterance out of none.
    lengths = [len(reference) for reference in output.references[: len(references)]]
    edits = [sum(map(_edits, chunks)) for chunks in output.alignments[: len(references)]]
    return Counts(np.array(edits, dtype=np.int64), np.array(lengths, dtype=np.int64))


def _edits(chunk: jiwer.AlignmentChunk) -> int:
    spans = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
    return 0 if chunk.type == "equal" else max(spans)


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

    nan if LoRA forgets nothing (lora <= base).
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
