"""Macro-averages of error rates, and percentile-bootstrap intervals over utterances.

Utterances are resampled with replacement, each with its edits and its length, and the rate is
pooled again; systems that are compared share the resampled utterances.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blora_pyro.metrics.error_rates import Counts

FloatArray = npt.NDArray[np.float64]
INDICES_IN_MEMORY = 20_000  # resampled indices in memory at a time


def macro_rate(sets: Sequence[Counts]) -> float:
    """Return the mean of the sets' pooled rates: of backward sets, the backward error."""
    return sum(counts.rate for counts in sets) / len(sets) if sets else float("nan")


def macro_bootstrap_interval(
    sets: Sequence[Counts], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of `macro_rate` over one or more sets.

    Each set's utterances are resampled separately. Draws without reference tokens are dropped;
    (nan, nan) if none is left.

    Raises:
        ValueError: if there is no set, `level` is not between 0 and 1, or `draws` is below 1.
    """
    if not sets:
        raise ValueError("got no set of counts; give at least one to average over")
    rng = np.random.default_rng(seed)
    rates = [_resampled_rates([counts], draws, rng)[0] for counts in sets]
    return percentile_interval(np.mean(rates, axis=0), level)


def paired_macro_bootstrap(
    sets_a: Sequence[Counts],
    sets_b: Sequence[Counts],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Compare the macro-averages of two systems over the same sets, such as backward errors.

    Returns (difference, low, high): macro_rate(b) - macro_rate(a) and its percentile interval, each
    set's utterances resampled separately, shared by both systems. With a = base it is forgetting.

    Raises:
        ValueError: if the numbers of utterances differ, and as `macro_bootstrap_interval`.
    """
    differences = _resampled_differences(sets_a, sets_b, draws, seed)
    return macro_rate(sets_b) - macro_rate(sets_a), *percentile_interval(differences, level)


def paired_macro_quantile(
    sets_a: Sequence[Counts],
    sets_b: Sequence[Counts],
    quantile: float,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """Return a quantile of the differences that `paired_macro_bootstrap` takes its interval of.

    nan where no draw has reference tokens.

    Raises:
        ValueError: if the quantile is not between 0 and 1, and as `paired_macro_bootstrap`.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}; 0.95 is usual")
    differences = _resampled_differences(sets_a, sets_b, draws, seed)
    differences = differences[~np.isnan(differences)]
    return float(np.quantile(differences, quantile)) if differences.size else float("nan")


def _resampled_differences(
    sets_a: Sequence[Counts], sets_b: Sequence[Counts], draws: int, seed: int
) -> FloatArray:
    """Return macro_rate(b) - macro_rate(a) of resampled utterances, shape (draws,)."""
    sizes_a, sizes_b = ([len(counts.edits) for counts in sets] for sets in (sets_a, sets_b))
    if sizes_a != sizes_b or not sizes_a:
        raise ValueError(f"got sets of {sizes_a} and {sizes_b} utterances; give the same ones")
    rng = np.random.default_rng(seed)
    pairs = [_resampled_rates([a, b], draws, rng) for a, b in zip(sets_a, sets_b, strict=True)]
    rates = np.mean(pairs, axis=0)
    differences: FloatArray = rates[1] - rates[0]
    return differences


def paired_rates(systems: Sequence[Counts], draws: int = 1000, seed: int = 0) -> FloatArray:
    """Rates of several systems on the same utterances, for comparisons of any kind.

    Returns shape (systems, 1 + draws): the pooled rates, then those of `draws` resamplings of the
    utterances, which all systems share. Means, differences and quotients along the first axis keep
    the pairing; `percentile_interval` turns them into intervals. Equal seeds and numbers of
    utterances give equal resamplings.

    Raises:
        ValueError: if the numbers of utterances differ, or there is no system.
    """
    sizes = [len(counts.edits) for counts in systems]
    if len(set(sizes)) != 1:
        raise ValueError(f"got systems of {sizes} utterances; give the same ones")
    observed = [[counts.rate] for counts in systems]
    resampled = _resampled_rates(list(systems), draws, np.random.default_rng(seed))
    return np.concatenate([observed, resampled], axis=1)


def percentile_interval(values: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds `level` of the values, ignoring nan.

    (nan, nan) if no value is left.

    Raises:
        ValueError: if `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; 0.95 is usual")
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_rates(systems: list[Counts], draws: int, rng: np.random.Generator) -> FloatArray:
    """Return pooled rates, shape (systems, draws), all systems on the same resampled utterances."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    table = np.stack([[counts.edits, counts.lengths] for counts in systems])  # (systems, 2, n)
    n = table.shape[-1]
    totals = np.zeros((len(systems), 2, draws))
    # A block of draws at a time: all at once would hold draws x n indices, gigabytes for a big set.
    block = max(1, INDICES_IN_MEMORY // max(n, 1))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        chosen = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=count * n).reshape(count, n)
        totals[:, :, start : start + count] = table @ weights.T
    edits, lengths = totals[:, 0], totals[:, 1]
    return np.divide(edits, lengths, out=np.full_like(edits, np.nan), where=lengths > 0)
