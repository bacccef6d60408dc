import copy
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data import Batch
from blora_pyro.fitting.batches import SpecAugment, batches, micro_batches

quick = settings(deadline=None, max_examples=60)

# ---- order


class Numbers:
    """Stands for `Examples`: a batch of it is the list of its indices."""

    def __init__(self, size):
        self.size = size
        self.sources = [0] * size

    def __len__(self):
        return self.size

    def batch(self, indices):
        return list(indices)


def order(*args, count, **options):
    """The indices of the first batches."""
    return [batch for batch, _ in itertools.islice(batches(*args, **options), count)]


@quick
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31), st.integers(1, 3))
def test_every_example_comes_once_an_epoch(size, batch_size, seed, epochs):
    a_epoch = math.ceil(size / batch_size)
    found = order(Numbers(size), batch_size, seed, count=a_epoch * epochs)
    for start in range(0, len(found), a_epoch):
        epoch = found[start : start + a_epoch]
        assert sorted(itertools.chain(*epoch)) == list(range(size))
        assert [len(batch) for batch in epoch[:-1]] == [batch_size] * (a_epoch - 1)


@quick
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31))
def test_the_order_depends_on_the_seed_alone(size, batch_size, seed):
    first = order(Numbers(size), batch_size, seed, count=12)
    torch.rand(1)
    assert first == order(Numbers(size), batch_size, seed, count=12)


@quick
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31), st.integers(0, 60))
def test_the_order_can_be_entered_anywhere(size, batch_size, seed, begin):
    whole = order(Numbers(size), batch_size, seed, count=begin + 9)
    assert order(Numbers(size), batch_size, seed, start=begin, count=9) == whole[begin:]


def test_epochs_and_seeds_differ_in_their_order():
    one, two = order(Numbers(30), 30, 0, count=2)
    assert one != two
    assert one != order(Numbers(30), 30, 1, count=1)[0]


# ---- SpecAugment


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


# ---- micro-batches


def test_micro_batches_are_the_batch_in_order(batch):
    for count, sizes in ((1, [3]), (2, [2, 1]), (3, [1, 1, 1]), (9, [1, 1, 1])):
        parts = micro_batches(batch, count)
        assert [len(part.input_features) for part in parts] == sizes
        for name in ("input_features", "decoder_input_ids", "labels"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
    assert [part.num_tokens for part in micro_batches(batch, 3)] == [4, 4, 2]  # ragged
