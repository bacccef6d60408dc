import math

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.adapters import Group
from blora_pyro.guides import normal
from blora_pyro.guides.a_only import Guide, Prior
from blora_pyro.models import FactorPrior

GROUPS = (
    Group(("one", "two"), out_features=6, in_features=5, rank=3),
    Group(("three",), out_features=4, in_features=7, rank=3),
)
SCALE = 0.2


@pytest.fixture
def prior():
    return FactorPrior(GROUPS, Prior(SCALE), torch.device("cpu"))


@pytest.fixture
def guide(prior):
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def test_every_a_is_random_and_every_b_a_point(prior, guide):
    first, second = guide(), guide()
    nodes = poutine.trace(guide).get_trace().nodes
    for site in prior.sites:
        fn = nodes[site.name]["fn"]
        assert fn.batch_shape == site.shape[:1]
        assert fn.event_shape == site.shape[1:]
        if site.factor == "A":
            assert (first[site.name] != second[site.name]).all()
        else:
            assert torch.equal(first[site.name], second[site.name])
            assert torch.equal(first[site.name], guide.mean()[site.name])
            assert (guide.stddev()[site.name] == 0).all()


def test_its_variances_take_no_parameters_for_b(prior, guide):
    count = sum(parameter.numel() for parameter in guide.parameters())
    a_weights = sum(math.prod(site.shape) for site in prior.sites if site.factor == "A")
    assert count == prior.num_weights + a_weights


def test_the_kl_is_closed_form_for_a_and_the_log_density_for_b(prior, guide):
    expected = 0.0
    for site in prior.sites:
        mean, sigma = (part[site.name].double().numpy() for part in (guide.mean(), guide.stddev()))
        if site.factor == "A":
            kl = np.log(SCALE / sigma) + (sigma**2 + mean**2) / (2 * SCALE**2) - 0.5
        else:
            kl = 0.5 * (mean / SCALE) ** 2 + np.log(SCALE * math.sqrt(2 * math.pi))
        expected += kl.sum()
    assert TraceMeanField_ELBO().loss(prior, guide) == pytest.approx(expected, rel=1e-5)


def test_a_point_of_b_is_pulled_as_by_l2_and_a_as_under_the_normal_guide(prior, guide):
    TraceMeanField_ELBO().differentiable_loss(prior, guide).backward()
    for site in prior.sites:
        pull = guide.means[site.name].grad  # A's mean has the same pull, whatever its sigma
        torch.testing.assert_close(pull, guide.mean()[site.name] / SCALE**2)


def test_the_update_has_the_mean_and_the_covariance_of_a_gaussian_through_b(guide):
    """ΔW = B A: E = E B E A, and Var of (o, i) the sum over r of B² Var A."""
    group = GROUPS[0]
    a, b = (guide.mean()[site.name] for site in group.sites)
    with torch.no_grad():
        updates = torch.stack([d[group.B.name] @ d[group.A.name] for d in draws(guide, 600)])
    variance = b**2 @ guide.stddev()[group.A.name] ** 2
    z = (updates.mean(0) - b @ a) / variance.sqrt() * math.sqrt(600)
    assert z.abs().max() < 5
    assert ((updates.var(0) / variance) - 1).abs().max() < 5 * math.sqrt(2 / 600)


def draws(guide, count):
    return [guide() for _ in range(count)]


def test_its_prior_is_the_normal_one():
    assert Prior is normal.Prior
