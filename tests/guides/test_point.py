import copy

import peft
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal
from torch.nn.functional import cross_entropy

from blora_pyro.data import IGNORED
from blora_pyro.guides import normal
from blora_pyro.guides.point import Guide, Prior
from blora_pyro.models import BLoRA, Temper

SCALE = 0.1
LR = 3e-3
ELBOS = pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])


@pytest.fixture
def pristine(net):
    """A copy without our hooks."""
    return copy.deepcopy(net)


@pytest.fixture
def model(net, pristine):
    return BLoRA(net, Prior(SCALE), rank=4, alpha=12.0)


@pytest.fixture
def guide(model):
    """A from its start, B away from 0."""
    guide = Guide(model)
    with torch.no_grad():
        for mean in guide.means.values():
            mean += 0.05 * torch.randn_like(mean)
    return guide


def forward(net, batch):
    return net(
        input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
    ).logits


def token_nll(logits, batch):
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def tempered_loss(elbo, beta, model, guide, batch):
    temper = Temper(beta)
    return elbo().differentiable_loss(temper(model), temper(guide), batch)


def peft_lora(net, model, guide):
    """PEFT's LoRA on `net` at the points of the guide; the PEFT model and its factors."""
    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules="all-linear")
    lora = peft.get_peft_model(net, config).eval()
    factors = []
    with torch.no_grad():
        for group in model.groups:
            for i, name in enumerate(group.modules):
                layer = lora.get_submodule(f"base_model.model.{name}")
                for site, part in ((group.A, layer.lora_A), (group.B, layer.lora_B)):
                    weight = part["default"].weight
                    weight.copy_(guide.means[site.name][i])
                    factors.append(weight)
    return lora, factors


# PEFT asks transformers 5.23 for a deprecated attribute when it wraps a net.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@ELBOS
def test_with_beta_zero_it_is_the_lora_of_peft(elbo, net, pristine, model, guide, batch):
    lora, factors = peft_lora(pristine, model, guide)
    theirs = torch.optim.Adam(factors, lr=LR)
    ours = torch.optim.Adam(guide.parameters(), lr=LR)
    with torch.no_grad(), model.adapters.using(guide.mean()):
        start = forward(net, batch)
        torch.testing.assert_close(forward(lora.base_model.model, batch), start)
    for _ in range(3):
        loss = tempered_loss(elbo, 0.0, model, guide, batch)
        ours.zero_grad()
        loss.backward()
        ours.step()
        expected = token_nll(forward(lora.base_model.model, batch), batch)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.adapters.using(guide.mean()):
        end = forward(net, batch)
        torch.testing.assert_close(forward(lora.base_model.model, batch), end, rtol=0, atol=1e-5)
    assert (end - start).abs().max() > 0.01  # the steps went somewhere


@ELBOS
@pytest.mark.parametrize("beta", [1e-4, 0.5, 3.0])
def test_with_beta_it_is_the_map_estimate(elbo, beta, model, guide, batch):
    """Loss and gradient: NLL - beta · log p, that is, L2 of strength beta / (2 scale²)."""
    loss = tempered_loss(elbo, beta, model, guide, batch)
    with model.adapters.using(dict(guide.means.items())):
        nll = token_nll(forward(model.net, batch), batch)
    log_p = sum(Normal(0.0, SCALE).log_prob(mean).sum() for mean in guide.means.values())
    torch.testing.assert_close(loss, nll - beta * log_p, rtol=1e-5, atol=1e-5)
    means = list(guide.means.values())
    l2 = sum(mean.square().sum() for mean in means) / (2 * SCALE**2)
    got = torch.autograd.grad(loss, means)
    expected = torch.autograd.grad(nll + beta * l2, means)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_draws_no_noise(model, guide, batch):
    first, second = guide(batch), guide(batch)
    for name, mean in guide.mean().items():
        assert torch.equal(first[name], mean)
        assert torch.equal(second[name], mean)


def test_mean_and_stddev_have_the_shapes_of_the_sites(model, guide):
    shapes = {site.name: site.shape for site in model.sites}
    for part in (guide.mean(), guide.stddev()):
        assert {name: tuple(value.shape) for name, value in part.items()} == shapes
        assert not any(value.requires_grad for value in part.values())
    assert all((value == 0).all() for value in guide.stddev().values())


def test_its_prior_is_the_normal_one():
    assert Prior is normal.Prior
