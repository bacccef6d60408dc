import math

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.adapters import Group
from blora_pyro.guides.learned_scale import Guide, Prior
from blora_pyro.models import FactorPrior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)
SCALE, SPREAD = 0.2, 0.7


@pytest.fixture
def prior():
    return FactorPrior((GROUP,), Prior(SCALE, SPREAD), torch.device("cpu"))


@pytest.fixture
def guide(prior):
    """Away from its start, and other scales for every layer and factor."""
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def scales_of(guide):
    """s of every site, (modules,), float64."""
    nodes = poutine.trace(guide).get_trace().nodes
    return {
        s.name: nodes[f"{s.name}_scale"]["value"].detach().double().numpy() for s in GROUP.sites
    }


def moments(guide, site):
    return (part[site.name].double().numpy() for part in (guide.mean(), guide.stddev()))


def log_hyper(s):
    """The log-density of LogNormal(log SCALE, SPREAD²)."""
    z = (np.log(s) - math.log(SCALE)) / SPREAD
    return -0.5 * z**2 - np.log(s * SPREAD * math.sqrt(2 * math.pi))


def closed_form(mean, sigma, s):
    """KL(N(mean, sigma²) || N(0, s²)), (modules,)."""
    s = s[:, None, None]
    return (np.log(s / sigma) + (sigma**2 + mean**2) / (2 * s**2) - 0.5).sum((1, 2))


def test_the_prior_is_log_normal_scales_and_normals_of_these(prior):
    trace = poutine.trace(prior).get_trace()
    trace.compute_log_prob()
    for site in GROUP.sites:
        w, scale = (trace.nodes[name] for name in (site.name, f"{site.name}_scale"))
        s = scale["value"].double().numpy()
        assert s.shape == (2,)
        assert s[0] != s[1]
        z = w["value"].double().numpy() / s[:, None, None]
        expected = -0.5 * z**2 - np.log(s[:, None, None] * math.sqrt(2 * math.pi))
        np.testing.assert_allclose(w["log_prob"], expected.sum((1, 2)), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scale["log_prob"], log_hyper(s).sum(), rtol=1e-5, atol=1e-5)


def test_the_scales_have_the_documented_median_and_spread(prior):
    with torch.no_grad():
        logs = torch.stack(
            [
                poutine.trace(prior).get_trace().nodes["A_6x5_scale"]["value"].log()
                for _ in range(500)
            ]
        )
    assert logs.mean() == pytest.approx(math.log(SCALE), abs=5 * SPREAD / math.sqrt(1000))
    assert logs.std() == pytest.approx(SPREAD, rel=0.12)


def test_the_guide_starts_at_the_median_and_draws_no_scales(prior):
    guide = Guide(prior)
    for s in scales_of(guide).values():
        np.testing.assert_allclose(s, SCALE, rtol=1e-6)
    first, second = scales_of(guide), scales_of(guide)
    assert all((first[name] == second[name]).all() for name in first)


def test_the_kl_is_closed_form_given_the_scales_and_the_points_add_their_log_density(prior, guide):
    expected = sum(
        closed_form(*moments(guide, site), scales_of(guide)[site.name]).sum()
        - log_hyper(scales_of(guide)[site.name]).sum()
        for site in GROUP.sites
    )
    assert TraceMeanField_ELBO().loss(prior, guide) == pytest.approx(expected, rel=1e-5)


def test_the_best_scale_is_the_root_mean_square_but_for_the_pull_of_its_prior(prior, guide):
    """There the KL's gradient by log s is 0, and what is left is that of -log p(s)."""
    with torch.no_grad():
        for site in GROUP.sites:
            squares = guide.mean()[site.name] ** 2 + guide.stddev()[site.name] ** 2
            guide.log_scales[site.name].copy_(0.5 * squares.mean((1, 2)).log())
    TraceMeanField_ELBO().differentiable_loss(prior, guide).backward()
    for site in GROUP.sites:
        log_s = guide.log_scales[site.name]
        expected = (log_s.detach() - math.log(SCALE)) / SPREAD**2 + 1
        torch.testing.assert_close(log_s.grad, expected, rtol=1e-3, atol=1e-3)


def test_a_fit_finds_a_scale_for_every_layer():
    """Weights that are given, 0.02 wide in one layer and 0.15 in the other."""
    group = Group(("narrow", "wide"), out_features=100, in_features=100, rank=5)
    prior = FactorPrior((group,), Prior(), torch.device("cpu"))
    guide = Guide(prior)
    widths = torch.tensor([0.02, 0.15])
    with torch.no_grad():
        for name, mean in guide.means.items():
            mean.copy_(torch.randn_like(mean) * widths[:, None, None])
            guide.rhos[name].fill_(-12.0)
    optimizer = torch.optim.Adam(guide.log_scales.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        TraceMeanField_ELBO().differentiable_loss(prior, guide).backward()
        optimizer.step()
    nodes = poutine.trace(guide).get_trace().nodes
    for site in group.sites:
        rms = guide.mean()[site.name].square().mean((1, 2)).sqrt()
        torch.testing.assert_close(nodes[f"{site.name}_scale"]["value"], rms, rtol=0.03, atol=0)
