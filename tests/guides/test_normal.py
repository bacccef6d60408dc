import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine, set_rng_seed
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from blora_pyro.adapters import Group
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides.normal import RHO_RANGE, Guide, Prior, initial_mean, initial_rho
from blora_pyro.models import BLoRA, Temper
from blora_pyro.options import FittingOptions

SCALE = 0.07
quick = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model(net):
    return BLoRA(net, Prior(SCALE), rank=2)


@pytest.fixture
def guide(model):
    """Away from the start, so that no mean is 0 and the scales differ."""
    guide = Guide(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += torch.randn_like(parameter) * 0.1
        for rho in guide.rhos.values():
            rho += 2 * torch.rand_like(rho)
    return guide


def moments(guide):
    """Mean and standard deviation of every weight in a row, float64."""
    rows = [
        np.concatenate([value.numpy().ravel() for value in part.values()]).astype(np.float64)
        for part in (guide.mean(), guide.stddev())
    ]
    return rows[0], rows[1]


def closed_form(mean, sigma, scale):
    """KL(N(mean, sigma²) || N(0, scale²)), summed."""
    return np.sum(np.log(scale / sigma) + (sigma**2 + mean**2) / (2 * scale**2) - 0.5)


def program_kl(model, guide, batch):
    """The KL in Pyro's loss: loss(beta = 1) - loss(beta = 0), the same draw."""
    losses = []
    for beta in (1.0, 0.0):
        set_rng_seed(1)
        temper = Temper(beta)
        losses.append(TraceMeanField_ELBO().loss(temper(model), temper(guide), batch))
    return losses[0] - losses[1]


def test_prior_is_a_centred_normal_of_the_scale():
    group = Group(("a", "b", "c"), out_features=5, in_features=7, rank=2)
    for site in group.sites:
        prior = Prior(scale=0.2)(site)
        assert prior.batch_shape == (3,)
        assert prior.event_shape == site.shape[1:]
        w = torch.randn(site.shape)
        expected = -0.5 * (w / 0.2) ** 2 - np.log(0.2 * np.sqrt(2 * np.pi))
        torch.testing.assert_close(prior.log_prob(w), expected.sum((1, 2)))


def test_the_kl_of_the_program_is_the_closed_form(model, guide, batch):
    mean, sigma = moments(guide)
    assert len(mean) == model.num_weights
    expected = closed_form(mean, sigma, SCALE)
    assert program_kl(model, guide, batch) == pytest.approx(expected, rel=1e-5)


def test_the_closed_form_is_the_monte_carlo_estimate_within_four_standard_errors(
    model, guide, batch
):
    mean, sigma = moments(guide)
    noise = np.random.default_rng(0).standard_normal((400, len(mean)))
    draws = mean + sigma * noise
    log_q = -0.5 * noise**2 - np.log(sigma)
    log_p = -0.5 * (draws / SCALE) ** 2 - np.log(SCALE)
    estimates = (log_q - log_p).sum(1)
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    kl = program_kl(model, guide, batch)
    assert abs(estimates.mean() - kl) < 4 * error
    assert error < 0.01 * kl  # a check worth its name


def test_trace_elbo_agrees_in_expectation(model, guide, batch):
    """Loss with one-draw KL minus loss with closed form, same draws: centred at 0."""
    temper = Temper(1.0)
    differences = []
    for seed in range(15):
        losses = []
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
            set_rng_seed(seed)
            losses.append(elbo.loss(temper(model), temper(guide), batch))
        differences.append(losses[0] - losses[1])
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    assert error > 0
    assert abs(np.mean(differences)) < 4 * error


@quick
@given(scale=st.floats(0.01, 2.0), mean=st.floats(-1, 1), sigma=st.floats(0.01, 1.0))
def test_kl_is_never_negative_and_zero_only_at_the_prior(net, scale, mean, sigma):
    site = Group(("a", "b"), out_features=3, in_features=4, rank=2).A
    q = torch.distributions.Normal(mean, sigma).expand(site.shape)
    q = torch.distributions.Independent(q, 2)
    kl = kl_divergence(q, Prior(scale)(site))
    assert kl.shape == (2,)
    assert (kl >= -1e-5).all()
    expected = closed_form(np.full(site.shape[1:], mean), sigma, scale)
    np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-4, atol=1e-4)
    same = torch.distributions.Independent(
        torch.distributions.Normal(0.0, scale).expand(site.shape), 2
    )
    assert kl_divergence(same, Prior(scale)(site)).abs().max() < 1e-5


def test_the_guide_has_one_plain_normal_site_a_factor(model, guide, batch):
    nodes = poutine.trace(guide).get_trace(batch).nodes
    sampled = [name for name, node in nodes.items() if node["type"] == "sample"]
    latent = [name for name in sampled if not name.startswith("modules_")]
    assert latent == [site.name for site in model.sites]
    for site in model.sites:
        node = nodes[site.name]
        assert node["fn"].batch_shape == site.shape[:1]
        assert node["fn"].event_shape == site.shape[1:]
        assert node["value"].shape == site.shape
        assert not node["infer"].get("is_auxiliary")


def test_draws_have_the_mean_and_stddev_of_the_guide(model, guide, batch):
    with torch.no_grad():
        draws = [guide(batch) for _ in range(400)]
    for site in model.sites:
        stacked = torch.stack([one[site.name] for one in draws])
        z = (stacked.mean(0) - guide.mean()[site.name]) / guide.stddev()[site.name] * 20
        assert z.pow(2).mean() == pytest.approx(1, abs=4 * (2 / z.numel()) ** 0.5)
        ratio = stacked.std(0) / guide.stddev()[site.name]
        assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_mean_and_stddev_have_the_shapes_of_the_sites_and_no_gradient(model, guide):
    for part in (guide.mean(), guide.stddev()):
        assert {name: tuple(value.shape) for name, value in part.items()} == {
            site.name: site.shape for site in model.sites
        }
        assert not any(value.requires_grad for value in part.values())
    assert all((value > 0).all() for value in guide.stddev().values())


def test_sigma_is_the_softplus_of_rho(model, guide, batch):
    nodes = poutine.trace(guide).get_trace(batch).nodes
    for site in model.sites:
        sigma = guide.rhos[site.name].exp().log1p()
        torch.testing.assert_close(nodes[site.name]["fn"].base_dist.scale, sigma)
        torch.testing.assert_close(guide.stddev()[site.name], sigma.detach())


def test_it_starts_at_zero_b_and_the_documented_rho(model):
    guide = Guide(model)
    for site in model.sites:
        mean, rho = guide.means[site.name], guide.rhos[site.name]
        assert rho.min() >= RHO_RANGE[0]
        assert rho.max() <= RHO_RANGE[1]
        assert (mean == 0).all() if site.factor == "B" else mean.std() > 0


def test_the_state_dict_holds_the_whole_guide(model, guide, batch):
    fresh = Guide(model)
    fresh.load_state_dict(guide.state_dict())
    set_rng_seed(4)
    draws = guide(batch)
    set_rng_seed(4)
    again = fresh(batch)
    assert all(torch.equal(draws[name], again[name]) for name in draws)


class Examples:
    """One batch for ever."""

    sources = (0, 0, 0)

    def __init__(self, batch):
        self._batch = batch

    def __len__(self):
        return 3

    def batch(self, indices):
        return self._batch


def test_a_heavy_kl_pulls_the_guide_to_the_prior(net, batch):
    """As beta grows the likelihood counts for nothing: mean to 0, stddev to the prior's."""
    model = BLoRA(net, Prior(SCALE), rank=2, target_modules="fc1")
    guide = Guide(model)
    options = FittingOptions(beta=1e3, lr=0.2, steps=80, batch_size=3)
    history = fit_guide(model, guide, Examples(batch), options)
    mean, sigma = moments(guide)
    assert np.abs(mean).max() < 0.1 * SCALE
    np.testing.assert_allclose(sigma, SCALE, rtol=0.05)
    assert history[-1].kl < 0.001 * history[0].kl


# ---- where it starts


@settings(deadline=None, max_examples=20)
@given(st.tuples(*(st.integers(1, 9) for _ in range(4))))
def test_a_and_rho_lie_in_their_ranges_and_b_is_zero(sizes):
    count, out_features, in_features, rank = sizes
    group = Group(tuple(f"layer{i}" for i in range(count)), out_features, in_features, rank)
    a, b = initial_mean(group.A), initial_mean(group.B)
    assert (a.shape, b.shape) == (group.A.shape, group.B.shape)
    assert 0 < a.abs().max() <= in_features**-0.5
    assert (b == 0).all()
    for site in group.sites:
        rho = initial_rho(site)
        assert rho.shape == site.shape
        assert RHO_RANGE[0] <= rho.min() <= rho.max() <= RHO_RANGE[1]


def test_a_and_rho_are_uniform_in_every_layer():
    group = Group(tuple("abcd"), out_features=50, in_features=100, rank=50)
    a, rho = initial_mean(group.A), initial_rho(group.A)
    assert not torch.equal(a[0], a[1])
    assert a.mean().item() == pytest.approx(0, abs=0.003)
    assert a.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert rho.mean().item() == pytest.approx(-5, abs=0.01)
    assert rho.std().item() == pytest.approx(1 / 12**0.5, rel=0.02)


def test_a_starts_as_lora_of_peft_does():
    """PEFT's `kaiming_uniform_(a=sqrt(5))` on (rank, in_features) has the same bound."""
    weight = torch.empty(50, 100)
    nn.init.kaiming_uniform_(weight, a=5**0.5)
    ours = initial_mean(Group(("a",), 60, 100, rank=50).A)
    for one in (weight, ours):
        assert one.abs().max().item() == pytest.approx(0.1, rel=0.01)
