import numpy as np
import pytest
import torch

from blora_pyro.data.features import featurise
from blora_pyro.data.trimming import MARGIN, trim

RATE = 16_000


def wave(seconds, rest=0.0):
    """Noise, and zeros after it."""
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal(round(seconds * RATE))
    return np.concatenate([sound, np.zeros(round(rest * RATE))]).astype(np.float32)


def features(extractor, *waves):
    return featurise((("", one) for one in waves), extractor)


@pytest.mark.parametrize("seconds", [0.31, 1.0, 1.777])
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_what_is_left_is_the_audio_and_half_a_second(extractor, seconds, rest):
    whole = features(extractor, wave(seconds, rest))
    left = trim(whole)
    # a frame looks 12.5 ms to each side
    assert 100 * seconds <= left.shape[-1] - MARGIN <= 100 * seconds + 3
    assert left.shape[-1] % 2 == 0
    assert torch.equal(left, whole[..., : left.shape[-1]])
    cut = whole[..., left.shape[-1] :]
    assert (cut == whole.min()).all()


def test_the_longest_utterance_of_a_batch_decides(extractor):
    short, long = wave(0.5), wave(1.5)
    both = trim(features(extractor, short, long))
    assert both.shape[:2] == (2, 80)
    assert both.shape[-1] == trim(features(extractor, long)).shape[-1]
    assert both.shape[-1] > trim(features(extractor, short)).shape[-1]
    assert torch.equal(trim(both), both)


def test_a_full_window_stays_whole_and_silence_is_half_a_second(extractor):
    assert trim(features(extractor, wave(2.9))).shape[-1] == 300
    assert trim(features(extractor, wave(0, 1.0))).shape[-1] == MARGIN
