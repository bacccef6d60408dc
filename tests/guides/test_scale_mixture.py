import math

import numpy as np
import pytest
import torch

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.guides import normal
from blora_pyro.guides.scale_mixture import Guide, Prior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)
WIDE = Group(("one",), out_features=50, in_features=400, rank=50).A


def density(w, scale, spike_scale, slab):
    parts = (
        share * np.exp(-0.5 * (w / width) ** 2) / (width * math.sqrt(2 * math.pi))
        for share, width in ((slab, scale), (1 - slab, spike_scale))
    )
    return sum(parts)


@pytest.mark.parametrize("slab", [0.1, 0.5, 0.8])
def test_the_prior_is_a_slab_and_a_spike_in_their_shares(slab):
    for site in GROUP.sites:
        w = 0.1 * torch.randn(site.shape)
        expected = np.log(density(w.double().numpy(), 0.3, 0.02, slab)).sum((1, 2))
        np.testing.assert_allclose(
            Prior(0.3, 0.02, slab)(site).log_prob(w), expected, rtol=1e-5, atol=1e-5
        )


def test_its_density_is_one_in_all():
    w = np.linspace(-1, 1, 100_001)
    site = Group(("one",), out_features=1, in_features=1, rank=1).A
    prior = Prior(0.07, 0.01, 0.3)
    values = prior(site).log_prob(torch.from_numpy(w).float().reshape(-1, 1, 1, 1)).exp()
    assert np.trapezoid(values.double().numpy().ravel(), w) == pytest.approx(1, abs=1e-4)


def test_draws_have_the_variance_of_the_mixture_and_the_share_of_the_slab():
    prior = Prior(1.0, 0.001, 0.2)(WIDE)
    w = prior.sample()  # 20,000
    variance = 0.2 * 1.0 + 0.8 * 0.001**2
    torch.testing.assert_close(prior.variance, torch.full(WIDE.shape, variance))
    assert w.var() == pytest.approx(variance, rel=0.1)
    # |w| > 0.005 is five deviations of the spike, and 0.4% of the slab is nearer to 0
    assert (w.abs() > 0.005).float().mean() == pytest.approx(0.2 * 0.996, abs=0.012)


def test_small_weights_are_pulled_as_by_the_spike_and_large_ones_as_by_the_slab():
    site = Group(("one",), out_features=1, in_features=1, rank=1).A

    def pull(weight):
        w = torch.full(site.shape, weight, requires_grad=True)
        (gradient,) = torch.autograd.grad(Prior(1.0, 0.01, 0.5)(site).log_prob(w).sum(), w)
        return -float(gradient)

    assert pull(1e-3) == pytest.approx(1e-3 / 0.01**2, rel=0.05)
    assert pull(0.5) == pytest.approx(0.5 / 1.0**2, rel=1e-3)
    assert pull(30.0) == pytest.approx(30.0, rel=1e-3)  # where both densities are 0 in float32


@pytest.mark.parametrize("spike_scale", [0.07, 0.5])
def test_a_spike_as_wide_as_the_slab_is_refused(spike_scale):
    with pytest.raises(UserError, match=f"^spike_scale is {spike_scale}; .*below scale"):
        Prior(spike_scale=spike_scale)


@pytest.mark.parametrize("slab", [1, 1.5])
def test_a_share_of_everything_is_refused(slab):
    with pytest.raises(UserError, match=f"^slab is {slab}; give a share"):
        Prior(slab=slab)


def test_its_guide_is_the_normal_one():
    assert Guide is normal.Guide
