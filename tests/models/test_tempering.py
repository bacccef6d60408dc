import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine, set_rng_seed
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from blora_pyro.data import IGNORED
from blora_pyro.guides import auto_normal, normal
from blora_pyro.models import BLoRA, Temper

SCALE = 0.1
ELBOS = pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
GUIDES = pytest.mark.parametrize("family", [normal, auto_normal])


@pytest.fixture
def model(net):
    return BLoRA(net, normal.Prior(SCALE), rank=2, alpha=4.0)


def build(family, model, batch):
    """A guide with its parameters made, away from its start."""
    guide = family.Guide(model)
    guide(batch)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    return guide


def tempered_loss(elbo, beta, model, guide, batch):
    """The differentiable loss, always with the same draws."""
    set_rng_seed(3)
    temper = Temper(beta)
    return elbo().differentiable_loss(temper(model), temper(guide), batch)


def draw(guide, batch):
    """The draws of `tempered_loss`."""
    set_rng_seed(3)
    return guide(batch)


def token_nll(model, factors, batch):
    """Mean token NLL by torch alone, with `factors` in place."""
    with model.adapters.using(factors):
        logits = model.net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def kl_term(elbo, guide, batch):
    """What beta weighs, differentiable: the closed form, or log q - log p at the draw."""
    draws = draw(guide, batch)
    terms = []
    for name, value in draws.items():
        if isinstance(guide, normal.Guide):
            sigma = torch.nn.functional.softplus(guide.rhos[name])
            q = Normal(guide.means[name], sigma)
        else:
            q = Normal(*guide._get_loc_and_scale(name))
        p = Normal(0.0, SCALE)
        closed = isinstance(guide, normal.Guide) and elbo is TraceMeanField_ELBO
        term = kl_divergence(q, p) if closed else q.log_prob(value) - p.log_prob(value)
        terms.append(term.sum())
    return sum(terms)


def gradients(loss, guide):
    return torch.autograd.grad(loss, list(guide.parameters()))


@GUIDES
@ELBOS
def test_loss_is_nll_plus_beta_times_kl(family, elbo, model, batch):
    guide = build(family, model, batch)
    nll = token_nll(model, draw(guide, batch), batch).item()
    kl = kl_term(elbo, guide, batch).item()
    assert kl > 100  # so that a factor that is off shows
    for beta in (1e-3, 0.5, 1.0, 7.0):
        loss = tempered_loss(elbo, beta, model, guide, batch).item()
        assert loss - nll == pytest.approx(beta * kl, rel=1e-4, abs=1e-5)


@GUIDES
@ELBOS
def test_beta_zero_leaves_the_nll_of_the_noisy_draw(family, elbo, model, batch):
    guide = build(family, model, batch)
    loss = tempered_loss(elbo, 0.0, model, guide, batch)
    draws = draw(guide, batch)
    assert loss.item() == pytest.approx(token_nll(model, draws, batch).item(), rel=1e-6)
    mean = token_nll(model, guide.mean(), batch).item()
    assert loss.item() != pytest.approx(mean, rel=1e-6)  # the noise stays


@GUIDES
@ELBOS
@pytest.mark.parametrize("beta", [0.0, 1e-3, 2.0])
def test_the_gradient_of_the_likelihood_is_untouched(family, elbo, beta, model, batch):
    guide = build(family, model, batch)
    total = gradients(tempered_loss(elbo, beta, model, guide, batch), guide)
    kl = gradients(kl_term(elbo, guide, batch), guide)
    likelihood = gradients(token_nll(model, draw(guide, batch), batch), guide)
    for got, of_kl, of_nll in zip(total, kl, likelihood, strict=True):
        torch.testing.assert_close(got, beta * of_kl + of_nll, rtol=1e-4, atol=1e-5)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(beta=st.floats(1e-6, 1e3))
def test_every_latent_site_is_scaled_and_the_tokens_are_not(beta, model, batch):
    guide = normal.Guide(model)
    temper = Temper(beta)
    guide_trace = poutine.trace(temper(guide)).get_trace(batch)
    model_trace = poutine.trace(temper(poutine.replay(model, guide_trace))).get_trace(batch)
    for site in model.sites:
        assert model_trace.nodes[site.name]["scale"] == beta
        assert guide_trace.nodes[site.name]["scale"] == beta
    assert model_trace.nodes["tokens"]["scale"] == pytest.approx(1 / batch.num_tokens)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_conditioned_latent_site_is_left_alone(beta, model, batch):
    fixed, *others = [site.name for site in model.sites]
    value = torch.zeros(model.sites[0].shape)
    conditioned = poutine.condition(model, data={fixed: value})
    nodes = poutine.trace(Temper(beta)(conditioned)).get_trace(batch).nodes
    assert nodes[fixed]["is_observed"]
    assert (nodes[fixed]["scale"], nodes[fixed]["mask"]) == (1.0, None)
    for name in others:
        assert (nodes[name]["scale"], nodes[name]["mask"]) == (
            (beta, None) if beta else (1.0, False)
        )


def test_it_multiplies_a_scale_that_is_there(model, batch):
    scaled = poutine.scale(model, scale=5.0)
    nodes = poutine.trace(Temper(0.5)(scaled)).get_trace(batch).nodes
    assert nodes[model.sites[0].name]["scale"] == 2.5


@pytest.mark.parametrize("beta", [-1e-9, -1.0, math.inf, -math.inf, math.nan])
def test_a_beta_that_is_no_weight_is_refused(beta):
    with pytest.raises(ValueError, match="finite number >= 0"):
        Temper(beta)
