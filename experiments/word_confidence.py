"""Words of a test set with their confidences and marks of what is right, and measures of these.

The measures take n confidences in [0, 1] and n marks of what was right, both (n,).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blora_pyro import Posterior
from blora_pyro.data import load_split, read_audio
from blora_pyro.metrics import words
from blora_pyro.models import Base
from blora_pyro.transcription import Transcriber
from blora_pyro.transcription.windows import Recording
from blora_pyro.transcription.words import word_key

Floats = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]

SOFTMAX, AGREEMENT, EXP, CONFIDENCE = (
    "softmax of the mean",
    "agreement",
    "exp(log_prob)",
    "confidence",
)
RESAMPLES = 1000


class Mean(Posterior):
    """A posterior all of whose draws are its mean."""

    def draws(self, count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield the mean, again and again."""
        yield from [dict(self.mean)] * count


@dataclass(frozen=True)
class Words:
    """Words of a set: kinds of confidence, marks, and the utterances they are from, all (n,)."""

    kinds: dict[str, Floats]
    right: Marks
    utterances: npt.NDArray[np.int64]


def score(base: Base, folder: Path, domain: str, split: str, samples: int) -> Words:
    """Transcribe a set with draws, and once more with the mean in place of the draws."""
    dataset = load_split(domain, split)
    recordings = [Recording(str(i), read_audio(one)) for i, one in enumerate(dataset["audio"])]
    columns: dict[str, list[float]] = {name: [] for name in (SOFTMAX, AGREEMENT, EXP)}
    right: list[bool] = []
    utterances: list[int] = []
    posterior, mean = Posterior.load(folder), Mean.load(folder)
    if not any(spread.any() for spread in posterior.stddev.values()):
        # A point has no draws: its mean stands in for them, with a spread that is not used.
        stddev = {name: torch.ones_like(value) for name, value in mean.stddev.items()}
        posterior = mean = replace(mean, stddev=stddev)
        samples = 1
    transcripts = [
        Transcriber(base, one, domain, samples=count, batch_size=64).transcribe(recordings)
        for one, count in ((mean, 1), (posterior, samples))
    ]
    for place, (text, *both) in enumerate(zip(dataset["text"], *transcripts, strict=True)):
        plain, drawn = (
            [word for segment in one.segments for word in segment.words or ()] for one in both
        )
        columns[SOFTMAX] += [np.exp(word.log_prob) for word in plain]
        columns[AGREEMENT] += [word.agreement for word in drawn]
        columns[EXP] += [np.exp(word.log_prob) for word in drawn]
        right += right_words(text, [word.text for word in drawn])
        utterances += [place] * len(drawn)
    kinds = {name: np.array(values) for name, values in columns.items()}
    kinds[CONFIDENCE] = (kinds[AGREEMENT] + kinds[EXP]) / 2
    return Words(kinds, np.array(right), np.array(utterances))


def right_words(reference: str, hypothesis: Sequence[str]) -> list[bool]:
    """Return which words of a hypothesis the reference has, case and punctuation aside."""
    right = [False] * len(hypothesis)
    keys, expected = (
        " ".join(word_key(word) for word in row) for row in (hypothesis, words(reference))
    )
    for chunk in jiwer.process_words(expected, keys).alignments[0]:
        if chunk.type == "equal":
            right[chunk.hyp_start_idx : chunk.hyp_end_idx] = [True] * (
                chunk.hyp_end_idx - chunk.hyp_start_idx
            )
    return right


# ---- measures


@dataclass(frozen=True)
class Bins:
    """Confidences in bins of equal width, empty ones left out: all (bins,).

    Attributes:
        counts: Number of confidences in a bin.
        confidence: Their mean.
        accuracy: The share of them that was right.
    """

    counts: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def reliability(confidence: Floats, right: Marks, bins: int = 10) -> Bins:
    """Return mean confidence and accuracy by bins of equal width over [0, 1]."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums, hits = (np.bincount(places, one, minlength=bins) for one in (confidence, right))
    used = counts > 0
    return Bins(counts[used], sums[used] / counts[used], hits[used] / counts[used])


def calibration_error(confidence: Floats, right: Marks, bins: int = 10) -> float:
    """Return the expected calibration error: mean |confidence - accuracy| of a word's bin."""
    found = reliability(confidence, right, bins)
    gaps = np.abs(found.confidence - found.accuracy)
    return float((found.counts * gaps).sum() / found.counts.sum())


def brier_score(confidence: Floats, right: Marks) -> float:
    """Return the mean squared distance of the confidence from 1 where right, from 0 elsewhere."""
    return float(((confidence - right) ** 2).mean())


def auroc(confidence: Floats, right: Marks) -> float:
    """Return the chance that a right word has more confidence than a wrong one, ties half.

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


MEASURES: dict[str, Callable[..., float]] = {
    "ece": calibration_error,
    "brier": brier_score,
    "auroc": auroc,
}


def with_interval(values: Floats) -> dict[str, Any]:
    """Return the first value, and the 95% interval of the others."""
    ends = np.quantile(values[1:], (0.025, 0.975))
    interval = [round(float(end), 4) for end in ends]
    return {"value": round(float(values[0]), 4), "interval": interval}


def resampled(
    sets: dict[Any, Words], kind: str, sizes: dict[Any, tuple[str, int]]
) -> dict[str, Floats]:
    """Return measure -> its value, then those of resamplings of each domain's utterances.

    Args:
        sets: By any key.
        kind: Of confidence.
        sizes: Key -> domain and number of its utterances; sets of one domain are resampled alike.
    """
    rng = np.random.default_rng(0)
    domains = dict(sorted(sizes.values()))
    members = {
        key: [np.flatnonzero(one.utterances == i) for i in range(sizes[key][1])]
        for key, one in sets.items()
    }
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for draw in range(RESAMPLES + 1):
        drawn = {
            domain: np.sort(rng.integers(0, n, n)) if draw else np.arange(n)
            for domain, n in domains.items()
        }
        shares, right = [], []
        for key, one in sets.items():
            chosen = np.concatenate([members[key][i] for i in drawn[sizes[key][0]]])
            shares.append(one.kinds[kind][chosen])
            right.append(one.right[chosen])
        for measure, formula in MEASURES.items():
            values[measure].append(formula(np.concatenate(shares), np.concatenate(right)))
    return {measure: np.array(found) for measure, found in values.items()}
