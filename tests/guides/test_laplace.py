import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from blora_pyro.adapters import Group
from blora_pyro.guides import normal
from blora_pyro.guides.laplace import Guide, Prior
from blora_pyro.models import FactorPrior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)
quick = settings(deadline=None, max_examples=60)


def closed_form(mean, sigma, scale):
    """The docstring's KL(N(mean, sigma²) || Laplace(scale)), one weight."""
    folded = sigma * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * sigma**2))
    folded += mean * math.erf(mean / (sigma * math.sqrt(2)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    return folded / scale + math.log(2 * scale) - entropy


def test_the_prior_is_a_double_exponential_of_the_scale():
    for site in GROUP.sites:
        w = 0.3 * torch.randn(site.shape)
        expected = -np.abs(w.double().numpy()) / 0.2 - math.log(2 * 0.2)
        np.testing.assert_allclose(
            Prior(0.2)(site).log_prob(w), expected.sum((1, 2)), rtol=1e-5, atol=1e-5
        )


def test_the_scale_is_the_mean_of_the_magnitude_and_the_deviation_root_two_times_it():
    prior = Prior(0.2)(Group(("one",), out_features=50, in_features=400, rank=50).A)
    w = prior.sample().double()  # 20,000: a standard error of 0.0014
    assert w.abs().mean() == pytest.approx(0.2, abs=0.006)
    assert w.std() == pytest.approx(0.2 * 2**0.5, rel=0.04)
    torch.testing.assert_close(prior.stddev, torch.full((1, 50, 400), 0.2 * 2**0.5))


@quick
@given(mean=st.floats(-2, 2), sigma=st.floats(0.01, 2.0), scale=st.floats(0.02, 2.0))
def test_the_formula_of_the_docstring_is_the_kl_of_torch_and_the_integral(mean, sigma, scale):
    q, p = dist.Normal(mean, sigma), dist.Laplace(0.0, scale)
    expected = closed_form(mean, sigma, scale)
    assert float(kl_divergence(q, p)) == pytest.approx(expected, rel=1e-4, abs=1e-4)

    z = np.linspace(-10, 10, 20_001)  # the integral of q (log q - log p)
    w = mean + sigma * z
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    log_q = -0.5 * z**2 - math.log(sigma * math.sqrt(2 * math.pi))
    log_p = -np.abs(w) / scale - math.log(2 * scale)
    integral = np.trapezoid(density * (log_q - log_p), z)
    assert integral == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert expected > 0


def test_the_kl_of_the_loss_is_the_formula_of_the_docstring():
    prior = FactorPrior((GROUP,), Prior(0.2), torch.device("cpu"))
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    expected = sum(
        closed_form(mean, sigma, 0.2)
        for name, value in guide.mean().items()
        for mean, sigma in zip(
            value.flatten().tolist(), guide.stddev()[name].flatten().tolist(), strict=True
        )
    )
    assert TraceMeanField_ELBO().loss(prior, guide) == pytest.approx(expected, rel=1e-5)


def test_it_pulls_small_weights_harder_than_the_normal_prior_and_large_ones_less():
    site = Group(("one",), out_features=1, in_features=1, rank=1).A

    def pull(prior, weight):
        w = torch.full(site.shape, weight, requires_grad=True)
        (gradient,) = torch.autograd.grad(prior(site).log_prob(w).sum(), w)
        return -float(gradient)

    laplace, same_stddev = Prior(0.1 / 2**0.5), normal.Prior(0.1)
    assert pull(laplace, 0.02) > 5 * pull(same_stddev, 0.02)
    assert pull(laplace, 0.5) < 0.5 * pull(same_stddev, 0.5)


def test_its_guide_is_the_normal_one():
    assert Guide is normal.Guide
