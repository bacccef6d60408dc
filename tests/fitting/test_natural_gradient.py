import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import softplus

from blora_pyro.adapters import group_by_shape
from blora_pyro.errors import UserError
from blora_pyro.fitting.natural_gradient import (
    deviation_parameters,
    natural_step,
    rate,
)
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior, Temper

BETA = 0.01


def guide_of(name):
    family = name if name in ("a-only", "learned-scale") else "normal"
    groups = group_by_shape({"layer": nn.Linear(6, 5)}, 2)
    model = FactorPrior(groups, build_prior(family), torch.device("cpu"))
    return model, build_guide(name, model)


def test_the_gradient_of_the_loss_is_the_distance_to_the_optimum():
    """With the NLL h w² / 2, whose curvature is h everywhere, and its expectation in closed form.

    One small step in log sigma² is then rate · (1 - sigma² (1 / s² + h / beta)).
    """
    model, guide = guide_of("normal")
    h, (rhos, sites) = 0.3, (deviation_parameters(guide, BETA), model.sites)
    temper = Temper(BETA)
    loss = TraceMeanField_ELBO().differentiable_loss(temper(model), temper(guide))
    for site in sites:
        q = guide.distribution(site)
        loss = loss + h / 2 * (q.mean.square() + q.variance).sum()
    loss.backward()
    before = [softplus(rho.detach()) for rho in rhos]
    natural_step(rhos, BETA, 999)
    for sigma, rho in zip(before, rhos, strict=True):
        change = 2 * (softplus(rho.detach()) / sigma).log()
        expected = rate(999) * (1 - sigma**2 * (1 / model.prior.scale**2 + h / BETA))
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)


def test_without_data_deviations_become_the_priors():
    model, guide = guide_of("normal")
    rhos, temper, elbo = deviation_parameters(guide, BETA), Temper(BETA), TraceMeanField_ELBO()
    for step in range(200):
        guide.zero_grad()
        elbo.differentiable_loss(temper(model), temper(guide)).backward()
        natural_step(rhos, BETA, step)
    for sigma in guide.stddev().values():
        torch.testing.assert_close(
            sigma, torch.full_like(sigma, model.prior.scale), rtol=5e-3, atol=0
        )


@pytest.mark.parametrize(("slope", "factor"), [(1e30, 8.5), (-1e30, 2.5)])
def test_one_wild_draw_moves_a_precision_by_a_bounded_factor(slope, factor):
    rho = nn.Parameter(torch.tensor([-40.0, -5.0, 0.0, 3.0]))
    before = softplus(rho.detach())
    rho.grad = torch.full_like(rho, slope)
    natural_step([rho], BETA, 0)
    precisions = before.square() / softplus(rho.detach()).square()
    torch.testing.assert_close(precisions, torch.full_like(rho, factor), rtol=1e-4, atol=0)


def test_what_has_no_gradient_is_left():
    rho = nn.Parameter(torch.tensor([-5.0]))
    natural_step([rho], BETA, 0)
    assert rho.item() == -5


def test_rates_fall_so_that_any_start_is_forgotten_and_the_noise_averaged():
    rates = torch.tensor([rate(step) for step in range(400)])
    assert (rates.diff() <= 0).all()
    assert (
        1 - rates
    ).prod() < 1e-5  # of a precision that starts 100 times too high, or 5,000 times
    weights = rates * (1 - rates).flip(0).cumprod(0).flip(0) / (1 - rates)
    assert 150 < 1 / weights.square().sum() < 200  # steps that a precision is an average over


@pytest.mark.parametrize("name", ["normal", "a-only", "learned-scale"])
def test_they_are_the_deviations_of_every_mean_field_guide(name):
    _, guide = guide_of(name)
    random = [value for value in guide.stddev().values() if value.any()]
    found = deviation_parameters(guide, BETA)
    assert len(found) == len(random)
    for rho, sigma in zip(found, random, strict=True):
        assert torch.equal(softplus(rho.detach()), sigma)


@pytest.mark.parametrize(
    ("name", "beta", "message"),
    [
        ("point", BETA, "needs a mean-field Normal guide, .*give guide normal"),
        ("auto-normal", BETA, "needs a mean-field Normal guide"),
        ("auto-lowrank", BETA, "needs a mean-field Normal guide"),
        ("normal", 0.0, "needs a beta above 0"),
    ],
)
def test_what_it_can_not_fit_is_refused_in_one_line(name, beta, message):
    _, guide = guide_of(name)
    with pyro.get_param_store().scope():
        guide()
        with pytest.raises(UserError, match=message) as caught:
            deviation_parameters(guide, beta)
    assert "\n" not in str(caught.value)
