"""How well confidences tell right words from wrong ones, and whether they are what they say.

The measures take n confidences in [0, 1] and n marks of what was right, both (n,).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
import numpy.typing as npt

from blora_pyro.metrics import words
from blora_pyro.transcription.confidence import word_key

Floats = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bins:
    """Confidences in bins of equal width, empty ones left out: all (bins,).

    Attributes:
        counts: Confidences in a bin.
        confidence: Their mean.
        accuracy: The share of them that was right.
    """

    counts: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def right_words(reference: str, hypothesis: Sequence[str]) -> list[bool]:
    """Which words of a hypothesis the reference has at their place, case and punctuation aside."""
    right = [False] * len(hypothesis)
    keys, expected = (
        " ".join(word_key(word) for word in row) for row in (hypothesis, words(reference))
    )
    output = jiwer.process_words(expected, keys)
    for chunk in output.alignments[0]:
        if chunk.type == "equal":
            for place in range(chunk.hyp_start_idx, chunk.hyp_end_idx):
                right[place] = True
    return right


def reliability(confidence: Floats, right: Marks, bins: int = 10) -> Bins:
    """Mean confidence and accuracy by bins of equal width over [0, 1]."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums, hits = (np.bincount(places, one, minlength=bins) for one in (confidence, right))
    used = counts > 0
    return Bins(counts[used], sums[used] / counts[used], hits[used] / counts[used])


def calibration_error(confidence: Floats, right: Marks, bins: int = 10) -> float:
    """Expected calibration error: mean over all words of |confidence - accuracy| of their bin."""
    found = reliability(confidence, right, bins)
    gaps = np.abs(found.confidence - found.accuracy)
    return float((found.counts * gaps).sum() / found.counts.sum())


def brier_score(confidence: Floats, right: Marks) -> float:
    """Mean squared distance of the confidence from 1 where right, from 0 where wrong."""
    return float(((confidence - right) ** 2).mean())


def auroc(confidence: Floats, right: Marks) -> float:
    """Probability that a right word has more confidence than a wrong one, ties counting half.

    NaN unless there are both.
    """
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return float("nan")
    order = np.sort(confidence)
    ranks = (
        np.searchsorted(order, confidence) + np.searchsorted(order, confidence, "right") + 1
    ) / 2
    return float((ranks[right].sum() - good * (good + 1) / 2) / (good * bad))
