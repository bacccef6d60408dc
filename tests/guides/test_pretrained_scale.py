import math

import numpy as np
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.guides import normal
from blora_pyro.guides.pretrained_scale import Guide, Prior
from blora_pyro.models import BLoRA, FactorPrior

STDDEVS = (0.2, 0.05)
GROUP = Group(("one", "two"), out_features=6, in_features=5, rank=3, weight_stddevs=STDDEVS)


def test_the_prior_is_a_normal_as_wide_as_the_layers_weights():
    for site in GROUP.sites:
        w = 0.1 * torch.randn(site.shape)
        s = 1.5 * np.array(STDDEVS)[:, None, None]
        z = w.double().numpy() / s
        expected = (-0.5 * z**2 - np.log(s * math.sqrt(2 * math.pi))).sum((1, 2))
        np.testing.assert_allclose(Prior(1.5)(site).log_prob(w), expected, rtol=1e-5, atol=1e-5)


def test_the_kl_is_that_of_two_normals():
    prior = FactorPrior((GROUP,), Prior(), torch.device("cpu"))
    guide = Guide(prior)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    expected = 0.0
    for site in GROUP.sites:
        mean, sigma = (part[site.name].double().numpy() for part in (guide.mean(), guide.stddev()))
        s = np.array(STDDEVS)[:, None, None]
        expected += (np.log(s / sigma) + (sigma**2 + mean**2) / (2 * s**2) - 0.5).sum()
    assert TraceMeanField_ELBO().loss(prior, guide) == pytest.approx(expected, rel=1e-5)


def test_in_a_whisper_the_width_is_that_of_the_frozen_weight(net):
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter *= 1 + 0.1 * i  # no two layers alike
    model = BLoRA(net, Prior(2.0), rank=2)
    seen = set()
    for group in model.groups:
        for site in group.sites:
            stddev = Prior(2.0)(site).stddev
            for i, name in enumerate(site.modules):
                weight = net.get_submodule(name).weight.numpy().astype(np.float64)
                np.testing.assert_allclose(stddev[i], 2 * weight.std(), rtol=1e-5, atol=1e-5)
                seen.add(float(stddev[i, 0, 0]))
    assert len(seen) == sum(len(group.modules) for group in model.groups)


def test_without_the_base_models_weights_it_is_refused():
    for site in Group(("one", "two"), out_features=6, in_features=5, rank=3).sites:
        with pytest.raises(UserError, match="pretrained-scale needs the base model's weights"):
            Prior()(site)


def test_its_guide_is_the_normal_one():
    assert Guide is normal.Guide
