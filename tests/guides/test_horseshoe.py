import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.adapters import Group
from blora_pyro.guides import normal
from blora_pyro.guides.horseshoe import Guide, Prior
from blora_pyro.models import FactorPrior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)
SCALE, GLOBAL = 0.2, 0.03


@pytest.fixture
def prior():
    return FactorPrior((GROUP,), Prior(SCALE, GLOBAL), torch.device("cpu"))


@pytest.fixture
def guide(prior):
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return guide


def scale_names(site):
    return f"{site.name}_global", f"{site.name}_local"


def scales_of(trace, site):
    """tau and lambda of a site, float64."""
    return (trace.nodes[name]["value"].detach().double().numpy() for name in scale_names(site))


def log_half_cauchy(x, scale):
    return np.log(2 / (math.pi * scale)) - np.log1p((x / scale) ** 2)


def width(tau, local, site):
    """Piironen and Vehtari's tau · lambda~, to broadcast against the site's shape."""
    squares = SCALE**2 * local**2 / (SCALE**2 + tau**2 * local**2)
    width = tau * np.sqrt(squares)
    return width[:, :, None] if site.factor == "A" else width[:, None, :]


def drawn(program):
    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    return trace


def test_the_prior_is_two_half_cauchy_scales_and_a_normal_of_the_regularised_width(prior):
    trace = drawn(prior)
    for site in GROUP.sites:
        tau, local = scales_of(trace, site)
        assert tau.shape == ()
        assert local.shape == (2, 3)  # modules, rank
        log_tau, log_local, log_w = (
            trace.nodes[name]["log_prob"] for name in (*scale_names(site), site.name)
        )
        np.testing.assert_allclose(log_tau, log_half_cauchy(tau, GLOBAL), rtol=1e-5, atol=1e-5)
        expected = log_half_cauchy(local, 1.0).sum()
        np.testing.assert_allclose(log_local.sum(), expected, rtol=1e-5, atol=1e-5)
        s = np.broadcast_to(width(tau, local, site), site.shape)
        z = trace.nodes[site.name]["value"].double().numpy() / s
        expected = (-0.5 * z**2 - np.log(s * math.sqrt(2 * math.pi))).sum((1, 2))
        np.testing.assert_allclose(log_w, expected, rtol=1e-4, atol=1e-4)


def given(program, tau, local):
    """`program` with all its tau and all its lambda of these values."""
    values = {}
    for site in GROUP.sites:
        values |= zip(
            scale_names(site), (torch.tensor(tau), torch.full((2, 3), local)), strict=True
        )
    return poutine.condition(program, data=values)


def test_a_rank_is_as_free_as_under_the_normal_prior_or_as_narrow_as_its_scales(prior):
    open_, shut = drawn(given(prior, 1e3, 1.0)), drawn(given(prior, 1e-3, 0.5))
    for site in GROUP.sites:
        free = normal.Prior(SCALE)(site).log_prob(open_.nodes[site.name]["value"])
        torch.testing.assert_close(open_.nodes[site.name]["log_prob"], free)
        stddev = shut.nodes[site.name]["fn"].stddev
        torch.testing.assert_close(stddev, torch.full(site.shape, 5e-4), rtol=1e-4, atol=0)


def test_the_medians_of_the_scales_are_those_of_the_docstring(prior):
    with torch.no_grad():
        draws = [poutine.trace(prior).get_trace() for _ in range(400)]
    for name, median in (("A_6x5_global", GLOBAL), ("B_6x5_local", 1.0)):
        logs = torch.stack([trace.nodes[name]["value"] for trace in draws]).log()
        # the density of log x at the median is 1 / pi
        error = math.pi / 2 / math.sqrt(logs.numel())
        assert logs.median() == pytest.approx(math.log(median), abs=5 * error)


def kl_of_weights(trace, scored):
    """KL(q(w | scales) || p(w | scales)) by the formula of two Normals, all sites together."""
    total = 0.0
    for site in GROUP.sites:
        q, p = (one.nodes[site.name]["fn"] for one in (trace, scored))
        mean, sigma, s = (value.detach().double().numpy() for value in (q.mean, q.stddev, p.stddev))
        total += (np.log(s / sigma) + (sigma**2 + mean**2) / (2 * s**2) - 0.5).sum()
    return total


def log_prior_of_scales(trace):
    total = 0.0
    for site in GROUP.sites:
        tau, local = scales_of(trace, site)
        total += log_half_cauchy(tau, GLOBAL) + log_half_cauchy(local, 1.0).sum()
    return total


def test_the_kl_of_the_weights_is_closed_form_given_the_scales_and_the_same_for_all(prior, guide):
    divergences = []
    for values in ((0.03, 1.0), (0.5, 0.2), (0.002, 3.0)):
        programs = given(prior, *values), given(guide, *values)
        weights = poutine.block(programs[1], expose=[site.name for site in GROUP.sites])
        losses = {TraceMeanField_ELBO().loss(programs[0], weights) for _ in range(3)}
        assert len(losses) == 1  # no noise
        trace = drawn(programs[1])
        scored = drawn(poutine.replay(programs[0], trace=trace))
        divergences.append(kl_of_weights(trace, scored))
        expected = divergences[-1] - log_prior_of_scales(trace)  # the scales count as data here
        assert losses.pop() == pytest.approx(expected, rel=1e-4)
    assert divergences[1:] == pytest.approx([divergences[0]] * 2, rel=1e-4)


def test_the_kl_of_the_scales_is_that_of_the_steps_own_draw(prior, guide):
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = TraceMeanField_ELBO().loss(prior, guide)
        pyro.set_rng_seed(seed)
        trace = drawn(guide)
        scored = drawn(poutine.replay(prior, trace=trace))
        names = [name for site in GROUP.sites for name in scale_names(site)]
        log_q = sum(trace.nodes[name]["log_prob_sum"].item() for name in names)
        expected = kl_of_weights(trace, scored) + log_q - log_prior_of_scales(trace)
        assert loss == pytest.approx(expected, rel=1e-4)


def test_shrinkage_is_one_minus_the_mean_square_of_the_width_in_slabs(guide):
    shrinkage = guide.shrinkage()
    with torch.no_grad():
        draws = [poutine.trace(guide).get_trace() for _ in range(500)]
    for site in GROUP.sites:
        ours = shrinkage[site.name].double().numpy()
        assert ours.shape == (2, 3)
        assert ((ours > 0) & (ours < 1)).all()
        widths = [width(*scales_of(trace, site), site).reshape(2, 3) for trace in draws]
        samples = 1 - (np.array(widths) / SCALE) ** 2
        error = samples.std(0, ddof=1) / math.sqrt(len(samples))
        assert (np.abs(samples.mean(0) - ours) < 5 * error).all()


def test_shrinkage_is_a_share_whatever_the_scales(prior):
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += torch.randn_like(parameter)  # log lambda ±10
    for value in guide.shrinkage().values():
        assert ((value >= 0) & (value <= 1)).all()
    for moment in (guide.mean(), guide.stddev()):
        assert all(value.isfinite().all() for value in moment.values())


def test_the_scales_of_the_guide_are_positive_and_random(guide):
    first, second = drawn(guide), drawn(guide)
    for site in GROUP.sites:
        for one, two in zip(scales_of(first, site), scales_of(second, site), strict=True):
            assert (one > 0).all()
            assert (one != two).all()
