import math

import numpy as np
import pytest
import torch

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.guides import normal
from blora_pyro.guides.student_t import Guide, Prior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)


def log_density(w, scale, df):
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return constant - math.log(scale) - (df + 1) / 2 * np.log1p((w / scale) ** 2 / df)


@pytest.mark.parametrize("df", [2.5, 4.0, 30.0])
def test_the_prior_is_a_students_t_of_the_scale_and_the_degrees_of_freedom(df):
    for site in GROUP.sites:
        w = 0.3 * torch.randn(site.shape)
        expected = log_density(w.double().numpy(), 0.2, df).sum((1, 2))
        np.testing.assert_allclose(Prior(0.2, df)(site).log_prob(w), expected, rtol=1e-5, atol=1e-5)


def test_it_is_a_normal_prior_with_inverse_gamma_variances():
    """∫ N(w; 0, v) InverseGamma(v; df / 2, df scale² / 2) dv, over log v."""
    scale, df = 0.2, 4.0
    shape, rate = df / 2, df * scale**2 / 2
    log_v = np.linspace(-16, 10, 20_001)
    v = np.exp(log_v)
    log_gamma = shape * math.log(rate) - math.lgamma(shape) - (shape + 1) * log_v - rate / v
    site = Group(("one",), out_features=1, in_features=1, rank=1).A
    for w in (0.0, 0.05, -0.3, 2.0):
        log_normal = -0.5 * w**2 / v - 0.5 * np.log(2 * math.pi * v)
        density = np.trapezoid(np.exp(log_normal + log_gamma + log_v), log_v)
        ours = Prior(scale, df)(site).log_prob(torch.full(site.shape, w))
        assert float(ours) == pytest.approx(math.log(density), abs=1e-4)


@pytest.mark.parametrize("df", [2.1, 4.0, 100.0])
def test_the_deviation_is_that_of_the_docstring(df):
    expected = 0.2 * math.sqrt(df / (df - 2))
    for site in GROUP.sites:
        stddev = Prior(0.2, df)(site).stddev
        torch.testing.assert_close(stddev, torch.full(site.shape, expected))


def test_with_many_degrees_of_freedom_it_is_the_normal_prior():
    for site in GROUP.sites:
        w = 0.1 * torch.randn(site.shape)
        ours, normals = (prior(site).log_prob(w) for prior in (Prior(0.2, 1e3), normal.Prior(0.2)))
        torch.testing.assert_close(ours, normals, rtol=0.01, atol=0.01)


def test_it_forgives_outliers():
    site = Group(("one",), out_features=1, in_features=1, rank=1).A
    prior = Prior(0.035, 4.0)
    pulls = []
    for weight in (0.07, 0.7, 7.0):
        w = torch.full(site.shape, weight, requires_grad=True)
        (gradient,) = torch.autograd.grad(prior(site).log_prob(w).sum(), w)
        pulls.append(-float(gradient))
    assert pulls[0] > 5 * pulls[1] > 25 * pulls[2] > 0


@pytest.mark.parametrize("df", [2, 1.0, 2.0])
def test_degrees_of_freedom_without_a_variance_are_refused(df):
    with pytest.raises(UserError, match=f"^df is {df}; give a number above 2"):
        Prior(df=df)


def test_its_guide_is_the_normal_one():
    assert Guide is normal.Guide
