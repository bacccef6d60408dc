import math

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from blora_pyro.adapters import Group, Site
from blora_pyro.errors import UserError
from blora_pyro.guides import build_guide
from blora_pyro.guides.previous_posterior import Prior, start_at
from blora_pyro.models import FactorPrior

GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3)
WEIGHTS = 2 * 3 * (6 + 5)


@pytest.fixture
def tensors():
    found = {}
    for site in GROUP.sites:
        found[f"{site.name}.mean"] = torch.randn(site.shape)
        found[f"{site.name}.stddev"] = torch.rand(site.shape) + 1e-4
    return found


def moments(tensors):
    return [
        {site.name: tensors[f"{site.name}.{moment}"] for site in GROUP.sites}
        for moment in ("mean", "stddev")
    ]


def program(tensors, inflation=1.0):
    return FactorPrior((GROUP,), Prior((GROUP,), tensors, inflation), torch.device("cpu"))


def started(model, tensors):
    guide = build_guide("normal", model)
    start_at(guide, *moments(tensors))
    return guide


@pytest.mark.parametrize("inflation", [1.0, 2.5])
def test_the_prior_is_the_posterior_with_wider_deviations(tensors, inflation):
    prior = Prior((GROUP,), tensors, inflation)
    for site in GROUP.sites:
        found = prior(site)
        assert (found.batch_shape, found.event_shape) == (site.shape[:1], site.shape[1:])
        assert torch.equal(found.mean, tensors[f"{site.name}.mean"])
        assert torch.equal(found.stddev, inflation * tensors[f"{site.name}.stddev"])


def test_the_prior_is_where_tensors_are_made(tensors):
    prior = Prior((GROUP,), tensors)
    for device in ("meta", "cpu"):
        with torch.device(device):
            assert prior(GROUP.A).mean.device.type == device


def test_one_layers_prior_is_its_part(tensors):
    one = Site(GROUP.A.name, "A", ("two",), (1, *GROUP.A.shape[1:]))
    found = Prior((GROUP,), tensors)(one)
    assert torch.equal(found.mean, tensors[f"{one.name}.mean"][1:])


def test_other_layers_have_none(tensors):
    with pytest.raises(UserError, match="the earlier run has no A_6x5 of these layers"):
        Prior((GROUP,), tensors)(Site(GROUP.A.name, "A", ("three",), (1, 3, 5)))


@pytest.mark.parametrize("inflation", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_an_inflation_below_1_is_refused(tensors, inflation):
    with pytest.raises(UserError, match="give a number from 1"):
        Prior((GROUP,), tensors, inflation)


def test_the_guide_starts_at_the_posterior(tensors):
    guide = started(program(tensors), tensors)
    for found, wanted in zip((guide.mean(), guide.stddev()), moments(tensors), strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inflation", [1.0, 3.0])
def test_the_kl_at_the_start_is_that_of_the_inflation_alone_and_has_no_noise(tensors, inflation):
    """For every weight log F + 1 / (2 F²) - 1/2: 0 at F = 1."""
    model = program(tensors, inflation)
    guide = started(model, tensors)
    expected = WEIGHTS * (math.log(inflation) + 0.5 / inflation**2 - 0.5)
    losses = [TraceMeanField_ELBO().loss(model, guide) for _ in range(2)]
    assert losses[0] == losses[1]  # in closed form
    assert losses[0] == pytest.approx(expected, abs=1e-4)


def test_the_kl_is_that_of_two_normals(tensors):
    model = program(tensors, 1.5)
    guide = started(model, tensors)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    total = 0.0
    for site in GROUP.sites:
        m, s = guide.mean()[site.name].double(), guide.stddev()[site.name].double()
        m0 = tensors[f"{site.name}.mean"].double()
        s0 = 1.5 * tensors[f"{site.name}.stddev"].double()
        total += float(((s0 / s).log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5).sum())
        q, p = guide.distribution(site), model.prior(site)
        assert kl_divergence(q, p).shape == (2,)
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(total, rel=1e-4)
