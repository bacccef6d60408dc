import copy

import numpy as np
import pyro
import pytest
import torch

from blora_pyro.data import Batch
from blora_pyro.fitting.augmentation import SpecAugment


def ones(net, size=6):
    shape = (size, net.config.num_mel_bins, 2 * net.config.max_source_positions)
    tokens = torch.zeros(size, 3, dtype=torch.long)
    return Batch(torch.ones(shape), tokens, tokens)


def masked(net, batches=40):
    """The masks of many batches, (batches · utterances, mels, frames)."""
    augment = SpecAugment(net.config)
    return torch.cat([augment(ones(net)).input_features for _ in range(batches)]) == 0


def test_whole_frames_and_whole_bins_are_masked_and_nothing_else_is_touched(net):
    mask = masked(net)
    frames, bins = mask.all(1), mask.all(2)
    assert torch.equal(mask, frames[:, None] | bins[:, :, None])
    assert frames.any() and bins.any()
    batch = ones(net)
    other = SpecAugment(net.config)(batch)
    assert (batch.input_features == 1).all()  # the given one is left as it was
    assert ((other.input_features == 1) | (other.input_features == 0)).all()
    assert other.labels is batch.labels and other.decoder_input_ids is batch.decoder_input_ids


def test_a_base_that_masks_no_bins_gets_the_default_shares(net):
    net.config.num_mel_bins, net.config.max_source_positions = 80, 1500
    net.config.mask_time_prob = net.config.mask_feature_prob = 0.0
    mask = masked(net, batches=20)
    assert mask.all(1).float().mean() == pytest.approx(0.05, abs=0.005)  # some spans overlap
    assert mask.all(2).float().mean() == pytest.approx(0.1, abs=0.03)


def test_a_base_keeps_its_own_shares(net):
    net.config.num_mel_bins, net.config.max_source_positions = 80, 1500
    net.config.mask_time_prob, net.config.mask_feature_prob = 0.3, 0.5
    net.config.mask_feature_length = 20
    before = copy.deepcopy(net.config.to_dict())
    mask = masked(net, batches=10)
    assert mask.all(1).float().mean() == pytest.approx(1 - np.exp(-0.3), abs=0.03)
    assert mask.all(2).float().mean() == pytest.approx(1 - np.exp(-0.5), abs=0.1)
    assert net.config.to_dict() == before


def test_no_span_is_wider_than_a_quarter(net):
    """transformers refuses a span of 10 of 8 bins."""
    assert net.config.num_mel_bins == 8 and net.config.mask_feature_length == 10
    assert masked(net).all(2).sum(1).max() <= 2


def test_the_masks_are_numpys_random_numbers(net):
    augment = SpecAugment(net.config)
    pyro.set_rng_seed(3)
    first, second = augment(ones(net)), augment(ones(net))
    assert not torch.equal(first.input_features, second.input_features)
    pyro.set_rng_seed(3)
    assert torch.equal(augment(ones(net)).input_features, first.input_features)
