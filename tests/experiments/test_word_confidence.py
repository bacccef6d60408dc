import math

import numpy as np
import pytest
from word_confidence import (
    Words,
    auroc,
    brier_score,
    calibration_error,
    reliability,
    resampled,
    right_words,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("Das rote Rad!", ["das", "rad"], [True, True]),
        ("das rote rad", ["das", "tote", "rad", "ab"], [True, False, True, False]),
        ("我喜欢 red", ["我", "喜", "花", "Red."], [True, True, False, True]),
        ("Don't e-mail him", ["don't", "E-Mail,", "him."], [True, True, True]),
        ("", ["das"], [False]),
        ("das", [], []),
    ],
)
def test_a_word_is_right_where_the_reference_has_it(reference, hypothesis, expected):
    assert right_words(reference, hypothesis) == expected


def test_measures_are_those_worked_out_by_hand():
    confidence = np.array([0.1, 0.15, 0.9, 0.95, 1.0])
    right = np.array([False, True, True, False, True])
    bins = reliability(confidence, right)
    assert bins.counts.tolist() == [2, 3]
    assert bins.confidence.tolist() == pytest.approx([0.125, 0.95])
    assert bins.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    expected = (2 * (0.5 - 0.125) + 3 * (0.95 - 2 / 3)) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    squares = [0.01, 0.7225, 0.01, 0.9025, 0.0]
    assert brier_score(confidence, right) == pytest.approx(sum(squares) / 5)
    assert auroc(confidence, right) == 4 / 6


def test_auroc_is_a_share_of_pairs():
    rng = np.random.default_rng(0)
    confidence = rng.integers(0, 5, 60) / 4  # with ties
    right = rng.random(60) < 0.3 + 0.5 * confidence
    good, bad = confidence[right][:, None], confidence[~right][None]
    expected = ((good > bad) + 0.5 * (good == bad)).mean()
    assert auroc(confidence, right) == pytest.approx(expected)
    assert auroc(np.full(4, 0.5), np.array([True, False, True, False])) == 0.5
    assert math.isnan(auroc(np.ones(2), np.array([True, True])))


def test_confidences_that_are_what_they_say_have_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence
    assert calibration_error(confidence, right) < 0.02
    assert calibration_error(confidence**3, right) > 0.2


def test_the_first_of_the_resampled_measures_is_that_of_all_words():
    rng = np.random.default_rng(0)
    shares, right = rng.random(50), rng.random(50) < 0.5
    words = Words({"kind": shares}, right, np.arange(50) // 5)
    found = resampled({"fit": words}, "kind", {"fit": ("de-en", 10)})
    assert found["auroc"][0] == auroc(shares, right)
    assert found["auroc"].shape == (1001,)
    assert found["ece"].std() > 0
