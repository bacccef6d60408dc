import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from blora_pyro.adapters import Group, find_targets, group_by_shape
from blora_pyro.diagnostics import summarise
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.spectra import effective_rank, spectra

GROUPS = (
    Group(("a.q_proj", "a.v_proj", "b.q_proj"), 4, 4, 2, (0.1, 0.2, 0.3)),
    Group(("a.fc1", "b.fc1"), out_features=6, in_features=4, rank=2, weight_stddevs=(0.4, 0.5)),
)
ALPHA = 5.0
SCALING = ALPHA / 2


def random_moments(groups) -> Posterior:
    """Of a comparable size, so that signal and noise are."""
    generator = torch.Generator().manual_seed(3)
    sites = [site for group in groups for site in group.sites]
    mean = {s.name: torch.randn(s.shape, generator=generator) for s in sites}
    stddev = {s.name: 0.1 + 0.5 * torch.rand(s.shape, generator=generator) for s in sites}
    return Posterior("made", groups, ALPHA, mean, stddev)


@pytest.fixture
def posterior() -> Posterior:
    return random_moments(GROUPS)


def test_singular_values_and_norms_are_those_of_the_whole_update(posterior):
    deltas = dict(posterior.delta_weights())
    rows = summarise(posterior).updates
    assert [row.module for row in rows] == list(deltas)
    for row in rows:
        delta = deltas[row.module].double()
        values = torch.linalg.svdvals(delta)
        assert row.singular_values == pytest.approx(values[:2].tolist(), rel=1e-4)
        assert values[2:].max() < 1e-5
        assert row.norm == pytest.approx(delta.norm().item(), rel=1e-5)


def test_singular_vectors_rebuild_the_update(posterior):
    deltas = dict(posterior.delta_weights())
    for group, spectrum in zip(GROUPS, spectra(posterior).values(), strict=True):
        rebuilt = spectrum.left @ torch.diag_embed(spectrum.values) @ spectrum.right.mT
        for i, module in enumerate(group.modules):
            torch.testing.assert_close(rebuilt[i], deltas[module], atol=1e-5, rtol=1e-4)
        for vectors in (spectrum.left, spectrum.right):
            identity = torch.eye(2).expand(len(group.modules), 2, 2)
            torch.testing.assert_close(vectors.mT @ vectors, identity, atol=1e-5, rtol=0)
    assert list(spectra(posterior)) == ["4x4", "6x4"]


def test_standard_deviations_of_singular_values_are_those_of_draws(posterior):
    count = 20_000
    found = summarise(posterior).updates
    for group, spectrum in zip(GROUPS, spectra(posterior).values(), strict=True):
        a, b = (
            Normal(posterior.mean[s.name], posterior.stddev[s.name]).sample((count,)).double()
            for s in group.sites
        )
        left, right = spectrum.left.double(), spectrum.right.double()
        values = SCALING * torch.einsum("mok,nmor,nmri,mik->nmk", left, b, a, right)
        squares = (values - spectrum.values).square()
        error = squares.std(0) / count**0.5
        assert (abs(squares.mean(0) - spectrum.stddevs.square()) < 4.5 * error).all()
        assert (error < 0.05 * squares.mean(0)).all()
        for i, module in enumerate(group.modules):
            (row,) = [row for row in found if row.module == module]
            assert row.singular_stddevs == tuple(spectrum.stddevs[i].tolist())
            assert row.directions == int((spectrum.values[i] > spectrum.stddevs[i]).sum())
    assert {row.directions for row in found} == {1, 2}


def test_ranks_that_differ_share_the_scaling_of_the_largest():
    groups = (
        Group(("a", "b"), 6, 4, 3, (0.1, 0.2), "_r3"),
        Group(("c",), 6, 4, 1, (0.3,), "_r1"),
    )
    posterior = random_moments(groups)
    rows = summarise(posterior).updates
    assert [len(row.singular_values) for row in rows] == [3, 3, 1]
    for row, (module, delta) in zip(rows, posterior.delta_weights(), strict=True):
        assert row.module == module
        values = torch.linalg.svdvals(delta)[: len(row.singular_values)]
        assert row.singular_values == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)


def test_the_norm_is_relative_to_the_frozen_weight(net):
    groups = group_by_shape(find_targets(net, "fc1,q_proj"), 2)
    assert len(groups) == 2
    posterior = random_moments(groups)
    for row in summarise(posterior).updates:
        frozen = net.get_submodule(row.module).weight
        assert row.relative_norm == pytest.approx(row.norm / frozen.norm().item(), rel=0.02)


def test_the_relative_norm_is_unknown_without_the_frozen_weight():
    group = GROUPS[0]
    posterior = random_moments((replace(group, weight_stddevs=()),))
    assert all(row.relative_norm is None for row in summarise(posterior).updates)


def test_an_update_that_is_zero_has_no_direction():
    posterior = random_moments(GROUPS)
    posterior.mean["B_4x4"].zero_()
    rows = summarise(posterior).updates[:3]
    for row in rows:
        assert row.norm == 0
        assert row.singular_values == (0, 0)
        assert row.directions == 0
        assert row.effective_rank == 1
        assert min(row.singular_stddevs) > 0


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0], 1.0),
        ([0.2, 0.0, 0.0], 1.0),
        ([5.0, 5.0, 5.0, 5.0], 4.0),
        ([1e-8, 1e-8], 2.0),
        ([2.0, 2.0, 0.0], 2.0),
        ([0.5, 0.25, 0.25], 2**1.5),
        ([0.0, 0.0], 1.0),
    ],
)
def test_effective_rank_of_known_spectra(values, rank):
    assert float(effective_rank(torch.tensor(values))) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_is_of_each_row_and_of_every_update(posterior):
    values = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(effective_rank(values), torch.tensor([2.0, 1.0]))
    for row in summarise(posterior).updates:
        shares = np.array(row.singular_values) / sum(row.singular_values)
        assert row.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_a_and_b_may_trade_a_rotation(posterior):
    """A -> R⁻¹ A, B -> B R is the same update: so are its figures, but for the noise."""
    rotation = torch.randn(2, 2)
    moved = {
        name: torch.linalg.solve(rotation, mean) if name[0] == "A" else mean @ rotation
        for name, mean in posterior.mean.items()
    }
    rows = zip(
        summarise(posterior).updates,
        summarise(replace(posterior, mean=moved)).updates,
        strict=True,
    )
    for row, other in rows:
        assert other.singular_values == pytest.approx(row.singular_values, rel=1e-3)
        assert other.norm == pytest.approx(row.norm, rel=1e-4)
        assert other.effective_rank == pytest.approx(row.effective_rank, rel=1e-3)
