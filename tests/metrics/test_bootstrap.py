import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import (
    macro_bootstrap_interval,
    macro_rate,
    paired_macro_bootstrap,
    paired_macro_quantile,
    paired_rates,
    percentile_interval,
)

quick = settings(deadline=None, max_examples=30)  # no deadline: the machine may be busy


def counts(edits, lengths):
    return Counts(np.array(edits, dtype=np.int64), np.array(lengths, dtype=np.int64))


def interval(corpus, **options):
    return macro_bootstrap_interval([corpus], **options)


def paired(a, b, **options):
    return paired_macro_bootstrap([a], [b], **options)


utterances = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=20, max_size=60
).map(lambda rows: counts(*zip(*rows, strict=True)))


@quick
@given(utterances, st.integers(0, 1000))
def test_interval_holds_the_point_estimate_and_depends_on_the_seed_alone(corpus, seed):
    low, high = interval(corpus, seed=seed)
    # The slack is for rounding where all utterances have the same rate.
    assert low - 1e-12 <= corpus.rate <= high + 1e-12
    assert interval(corpus, seed=seed) == (low, high)


def some_corpus(n=400, seed=1):
    return counts(np.random.default_rng(seed).integers(0, 10, size=n), [10] * n)


def test_interval_is_the_normal_one_for_many_equal_utterances():
    corpus = some_corpus()
    error = (corpus.edits / 10).std() / math.sqrt(400)
    low, high = interval(corpus, draws=4000)
    assert corpus.rate - low == pytest.approx(1.96 * error, rel=0.1)
    assert high - corpus.rate == pytest.approx(1.96 * error, rel=0.1)
    low, high = interval(corpus, level=0.5, draws=4000)
    assert high - low == pytest.approx(2 * 0.674 * error, rel=0.1)
    assert interval(corpus, seed=1) != interval(corpus, seed=2)


def test_interval_weighs_utterances_by_length():
    # Both utterances wrong throughout: pooled 1 in each draw, whatever is drawn.
    assert interval(counts([1, 50], [1, 50])) == (1.0, 1.0)
    # Half of the draws hold one of each: 99 of 100 words, where a mean of rates would be 1/2.
    assert interval(counts([0, 99], [1, 99]), level=0.4) == (0.99, 0.99)


def test_macro_rate_and_interval():
    one, two = counts([1], [4]), counts([30], [40])
    assert macro_rate([one, two]) == 0.5
    assert macro_bootstrap_interval([one, two]) == (0.5, 0.5)
    assert math.isnan(macro_rate([]))


def test_macro_interval_resamples_each_set_on_its_own():
    single = np.diff(interval(some_corpus(), draws=4000)).item()
    double = np.diff(macro_bootstrap_interval([some_corpus()] * 2, draws=4000)).item()
    assert double == pytest.approx(single / math.sqrt(2), rel=0.1)


def test_paired_bootstrap_is_paired():
    # One more edit in each utterance: the same difference in each draw, only if truly paired.
    better = some_corpus()
    worse = Counts(better.edits + 1, better.lengths)
    assert paired(better, worse) == pytest.approx((0.1, 0.1, 0.1))
    assert paired(worse, better) == pytest.approx((-0.1, -0.1, -0.1))


def test_paired_bootstrap_of_unrelated_systems():
    a, b = some_corpus(seed=1), some_corpus(seed=2)
    difference, low, high = paired(a, b, draws=4000)
    assert difference == b.rate - a.rate
    error = ((b.edits - a.edits) / 10).std() / math.sqrt(400)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_intervals_without_tokens_are_nan():
    empty, silent = counts([], []), counts([2, 0], [0, 0])
    for corpus in (empty, silent):
        assert np.isnan(interval(corpus)).all()
        assert np.isnan(paired(corpus, corpus)).all()
    assert np.isnan(macro_bootstrap_interval([some_corpus(), empty])).all()


def test_intervals_drop_draws_without_tokens():
    # A quarter of the draws holds the silent utterance alone: no rate, and no nan in the interval.
    assert interval(counts([0, 1], [0, 2])) == (0.5, 0.5)


def test_bootstrap_errors():
    corpus = some_corpus(n=3)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            interval(corpus, level=level)
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            paired(corpus, corpus, level=level)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        macro_bootstrap_interval([corpus], draws=0)
    with pytest.raises(ValueError, match="no set of counts"):
        macro_bootstrap_interval([])
    with pytest.raises(ValueError, match=r"got sets of \[3\] and \[4\] utterances"):
        paired(corpus, some_corpus(n=4))


def test_paired_macro_bootstrap_is_the_change_of_the_macro_average():
    base = [some_corpus(n=60), some_corpus(n=40)]
    worse = [Counts(counts.edits + 1, counts.lengths) for counts in base]
    difference, low, high = paired_macro_bootstrap(base, worse)
    assert difference == pytest.approx(macro_rate(worse) - macro_rate(base))
    assert low <= difference <= high
    assert paired_macro_bootstrap(base, base) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="give the same ones"):
        paired_macro_bootstrap(base, base[:1])
    with pytest.raises(ValueError, match="give the same ones"):
        paired_macro_bootstrap([], [])


# ---- several systems at once


def test_paired_macro_quantiles_are_those_of_the_interval():
    a, b = ([some_corpus(60, seed) for seed in pair] for pair in ((1, 2), (3, 4)))
    _, low, high = paired_macro_bootstrap(a, b, level=0.9)
    assert paired_macro_quantile(a, b, 0.05) == pytest.approx(low)
    assert paired_macro_quantile(a, b, 0.95) == pytest.approx(high)
    assert np.isnan(paired_macro_quantile([counts([0], [0])], [counts([0], [0])], 0.5))
    for quantile in (0, 1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            paired_macro_quantile(a, b, quantile)


def test_paired_rates_begin_with_the_observed_ones():
    a, b = counts([1, 2, 0], [4, 4, 4]), counts([0, 4, 4], [4, 4, 4])
    rates = paired_rates([a, b], draws=10)
    assert rates.shape == (2, 11)
    assert rates[:, 0].tolist() == [a.rate, b.rate]


def test_paired_rates_see_all_systems_on_the_same_utterances():
    rng = np.random.default_rng(0)
    edits = rng.integers(0, 5, 30)
    a, b = counts(edits, [10] * 30), counts(edits + 1, [10] * 30)
    rates = paired_rates([a, b, a], draws=50, seed=3)
    assert np.allclose(rates[1] - rates[0], 0.1)
    assert np.array_equal(rates[0], rates[2])
    assert rates[0].std() > 0
    assert np.array_equal(rates[:1], paired_rates([a], draws=50, seed=3))


def test_paired_rates_give_the_interval_of_the_paired():
    rng = np.random.default_rng(1)
    a, b = (counts(rng.integers(0, 5, 40), [10] * 40) for _ in range(2))
    rates = paired_rates([a, b], seed=7)
    expected = paired(a, b, seed=7)
    found = percentile_interval(rates[1, 1:] - rates[0, 1:])
    assert (rates[1, 0] - rates[0, 0], *found) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(2, 3), ()])
def test_paired_rates_refuse_other_utterances(sizes):
    systems = [counts([0] * size, [1] * size) for size in sizes]
    with pytest.raises(ValueError, match="utterances; give the same ones"):
        paired_rates(systems)
