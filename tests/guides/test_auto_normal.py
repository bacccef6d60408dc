import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from blora_pyro.data import Batch
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides.auto_normal import Guide
from blora_pyro.guides.normal import Prior
from blora_pyro.models import BLoRA, Temper
from blora_pyro.options import FittingOptions


@pytest.fixture
def model(net):
    return BLoRA(net, Prior(0.1), rank=4)


class Examples:
    """The part of `blora_pyro.data.Examples` that a fit needs, over one batch."""

    def __init__(self, whole):
        self._whole = whole
        self.sources = [0] * len(whole.labels)

    def __len__(self):
        return len(self._whole.labels)

    def batch(self, indices):
        whole = self._whole
        return Batch(
            whole.input_features[indices], whole.decoder_input_ids[indices], whole.labels[indices]
        )


def test_it_starts_at_the_base_in_the_mean_with_a_small_scale(model, batch):
    guide = Guide(model)
    guide(batch)
    for site in model.sites:
        mean = guide.mean()[site.name]
        if site.factor == "B":
            assert (mean == 0).all()
        else:
            assert 0 < mean.abs().max() <= site.shape[-1] ** -0.5
        torch.testing.assert_close(guide.stddev()[site.name], torch.full(site.shape, 0.007))
    logits = poutine.condition(model, data=guide.mean())(batch)
    model.adapters.clear()
    with torch.no_grad():
        base = model.net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits
    torch.testing.assert_close(logits, base, atol=1e-6, rtol=0)


def test_mean_and_stddev_have_the_shapes_of_the_sites_and_no_gradient(model, batch):
    guide = Guide(model)
    guide(batch)
    for part in (guide.mean(), guide.stddev()):
        assert {name: tuple(value.shape) for name, value in part.items()} == {
            site.name: site.shape for site in model.sites
        }
        assert not any(value.requires_grad for value in part.values())


def test_draws_have_the_mean_and_stddev_of_the_guide(model, batch):
    guide = Guide(model)
    with torch.no_grad():
        draws = [guide(batch) for _ in range(200)]
    for site in model.sites:
        stacked = torch.stack([one[site.name] for one in draws])
        assert stacked.shape == (200, *site.shape)
        error = (stacked.mean(0) - guide.mean()[site.name]) / 0.007 * math.sqrt(200)
        assert error.pow(2).mean() == pytest.approx(1, abs=4 * (2 / error.numel()) ** 0.5)
        assert stacked.std(0).mean() == pytest.approx(0.007, rel=0.02)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
def test_pyro_svi_fits_it(elbo, model, batch):
    guide, temper = Guide(model), Temper(1e-5)
    svi = SVI(temper(model), temper(guide), pyro.optim.Adam({"lr": 0.01}), loss=elbo())
    guide(batch)
    start = {name: value.clone() for name, value in guide.mean().items()}
    losses = [svi.step(batch) for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert all((guide.mean()[name] != start[name]).any() for name in start)
    assert all((value > 0).all() for value in guide.stddev().values())


def test_fit_guide_fits_it(model, batch):
    guide = Guide(model)
    options = FittingOptions(beta=1e-5, lr=0.02, steps=40, batch_size=2, seed=1)
    history = fit_guide(model, guide, Examples(batch), options)
    losses = [step.loss for step in history]
    assert len(losses) == 40
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.3
    assert all(math.isfinite(step.kl) for step in history)
    assert not pyro.get_param_store().keys()
    fitted = guide.mean()  # after the fit, outside of its parameter store
    assert all(fitted[site.name].abs().max() > 0.01 for site in model.sites)
    assert all((value != 0.007).any() for value in guide.stddev().values())
    assert all((value > 0).all() for value in guide.stddev().values())


def test_its_kl_is_a_one_draw_estimate(model, batch):
    guide, temper = Guide(model), Temper(1.0)
    losses = [TraceMeanField_ELBO().loss(temper(model), temper(guide), batch) for _ in range(3)]
    assert len(set(losses)) == 3
