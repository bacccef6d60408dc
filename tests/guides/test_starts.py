import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import softplus

from blora_pyro.adapters import Group
from blora_pyro.guides.starts import initial_mean, initial_rho, initial_values

groups = st.builds(
    lambda count, out_features, in_features, rank: Group(
        tuple(f"layer{i}" for i in range(count)), out_features, in_features, rank
    ),
    *(st.integers(1, 9) for _ in range(4)),
)
quick = settings(deadline=None, max_examples=50)


@quick
@given(group=groups)
def test_a_lies_within_the_kaiming_bound_and_b_is_zero(group):
    a, b = initial_mean(group.A), initial_mean(group.B)
    assert (a.shape, b.shape) == (group.A.shape, group.B.shape)
    assert a.abs().max() <= group.in_features**-0.5
    assert (a != 0).any()
    assert (b == 0).all()
    assert isinstance(a, nn.Parameter)
    assert isinstance(b, nn.Parameter)


@quick
@given(group=groups)
def test_rho_lies_in_its_range(group):
    for site in group.sites:
        rho = initial_rho(site)
        assert rho.shape == site.shape
        assert rho.min() >= -5.5
        assert rho.max() <= -4.5
        assert softplus(rho).min() >= 0.004
        assert softplus(rho).max() <= 0.0111


def test_both_are_uniform():
    group = Group(tuple("abcd"), out_features=50, in_features=100, rank=50)
    a, rho = initial_mean(group.A), initial_rho(group.A)
    assert a.mean().item() == pytest.approx(0, abs=0.003)
    assert a.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert rho.mean().item() == pytest.approx(-5, abs=0.01)
    assert rho.std().item() == pytest.approx(1 / 12**0.5, rel=0.02)


def test_a_starts_as_lora_of_peft_does():
    """PEFT's `kaiming_uniform_(a=sqrt(5))` on (rank, in_features) has the same bound."""
    weight = torch.empty(50, 100)
    nn.init.kaiming_uniform_(weight, a=5**0.5)
    assert weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
    ours = initial_mean(Group(("a",), 60, 100, rank=50).A)
    assert ours.abs().max().item() == pytest.approx(0.1, rel=0.01)


def test_every_module_starts_elsewhere():
    a = initial_mean(Group(("a", "b"), 3, 4, rank=2).A)
    assert not torch.equal(a[0], a[1])


@quick
@given(group=groups, seed=st.integers(0, 1000))
def test_the_seed_decides_the_start(group, seed):
    starts = []
    for _ in range(2):
        torch.manual_seed(seed)
        starts.append(initial_values(group.sites))
    assert starts[0].keys() == starts[1].keys() == {site.name for site in group.sites}
    for name, value in starts[0].items():
        assert torch.equal(value, starts[1][name])
        assert not value.requires_grad
