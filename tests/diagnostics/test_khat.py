import copy
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import HalfCauchy, Normal
from torch.nn.functional import cross_entropy

from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import Examples, read_manifest
from blora_pyro.diagnostics.khat import (
    Loo,
    at_draws,
    fit_khat,
    khat_meaning,
    leave_one_out,
    log_ratios,
    loo_meaning,
)
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.inference_data import pareto_khat

from .conftest import SCALING, fitted, gate_squared, sites_of


@pytest.fixture
def examples(tones_folder, tiny_base) -> Examples:
    dataset = read_manifest(tones_folder / "train.jsonl")
    return Examples(dataset, tiny_base.feature_extractor, tiny_base.tokenizer)


class Many:
    """The examples again and again."""

    def __init__(self, examples, count):
        self.examples, self.count = examples, count

    def __len__(self):
        return self.count

    def batch(self, indices):
        return self.examples.batch([index % len(self.examples) for index in indices])


def on(net, *args, **arguments) -> Posterior:
    groups = group_by_shape(find_targets(net, "fc1,q_proj"), 2)
    return fitted(*args, groups=groups, **arguments)


@torch.no_grad()
def pooled_nll(net, posterior, draw, examples, repeats):
    """Mean token NLL with the draw merged into a copy, utterance i taken `repeats[i]` times."""
    net = copy.deepcopy(net)
    for group in posterior.groups:
        for i, module in enumerate(group.modules):
            update = draw[group.B.name][i] @ draw[group.A.name][i]
            net.get_submodule(module).weight += SCALING * update
    total = tokens = 0.0
    for i, count in enumerate(repeats):
        batch = examples.batch([i])
        logits = net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits
        nll = cross_entropy(logits[0], batch.labels[0], ignore_index=-100, reduction="sum")
        total, tokens = total + count * nll.item(), tokens + count * batch.num_tokens
    return total / tokens


@pytest.mark.parametrize(("count", "repeats"), [(2, (1, 1)), (35, (18, 17))])
def test_log_ratios_are_likelihood_and_densities_at_each_draw(
    net, tiny_base, examples, count, repeats
):
    assert examples.batch([0]).num_tokens != examples.batch([1]).num_tokens
    posterior = on(net, "normal", scale=0.05)
    found = log_ratios(posterior, tiny_base, Many(examples, count), beta=0.01, draws=3)
    assert found.shape == (3,)
    for ratio, draw in zip(found, posterior.draws(3), strict=True):
        expected = -pooled_nll(net, posterior, draw, examples, repeats) / 0.01
        for name, w in draw.items():
            q = Normal(posterior.mean[name].double(), posterior.stddev[name].double())
            expected += (Normal(0.0, 0.05).log_prob(w.double()) - q.log_prob(w)).sum().item()
        assert ratio == pytest.approx(expected, rel=1e-5, abs=0.05)
    assert np.ptp(found) > 1


def test_log_ratios_count_the_scales(net, tiny_base, examples):
    posterior = on(net, "horseshoe", scale=0.05, global_scale=0.01)
    (found,) = log_ratios(posterior, tiny_base, examples, beta=1e9, draws=1)
    (draw,) = posterior.draws(1)
    state = torch.Generator().manual_seed(0).get_state()
    torch.set_rng_state(state)
    with torch.no_grad():
        expected = -pyro.poutine.trace(posterior.guide).get_trace().log_prob_sum().item()
    for site in sites_of(posterior):
        width = 0.05 * site.per_rank(gate_squared(draw, site, 0.05)).sqrt()
        expected += Normal(0.0, width).log_prob(draw[site.name]).sum().item()
        expected += HalfCauchy(0.01).log_prob(draw[f"{site.name}_global"]).item()
        expected += HalfCauchy(1.0).log_prob(draw[f"{site.name}_local"]).sum().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_log_ratios_leave_the_base_and_the_random_state_alone(net, tiny_base, examples):
    posterior = on(net, "normal")
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (log_ratios(posterior, tiny_base, examples, 0.1, draws=2) for _ in range(2))
    assert (first == again).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_log_ratios_are_unknown_without_the_scales_of_the_prior(net, tiny_base, examples):
    pruned = replace(on(net, "horseshoe"), state={})
    assert np.isnan(log_ratios(pruned, tiny_base, examples, beta=0.1, draws=2)).all()


def test_khat_of_a_fit_is_that_of_its_ratios(net, tiny_base, examples):
    posterior = on(net, "normal", scale=0.05)
    # nearly the prior, against a likelihood that hardly counts: a good fit
    near = replace(
        posterior,
        mean={name: 1e-3 * torch.ones_like(mean) for name, mean in posterior.mean.items()},
        stddev={name: torch.full_like(mean, 0.05) for name, mean in posterior.mean.items()},
        state={},
    )
    good = fit_khat(near, tiny_base, examples, beta=10.0, draws=60).value
    assert good == pareto_khat(log_ratios(near, tiny_base, examples, beta=10.0, draws=60))
    assert good < 0.7
    narrow = replace(near, stddev={n: 0.8 * value for n, value in near.stddev.items()})
    poor = fit_khat(narrow, tiny_base, examples, beta=10.0, draws=60).value
    assert good + 0.3 < poor < math.inf


def test_khat_of_a_point_is_infinite(net, tiny_base, examples):
    point = on(net, "normal", "point")
    assert fit_khat(point, tiny_base, examples, beta=1.0, draws=30).value == math.inf


def test_khat_is_read_by_the_rule_of_0_7():
    assert "close to it" in khat_meaning(0.6, 1000)
    high = khat_meaning(12.0, 405_504)
    assert "405,504 weights" in high
    assert "no test to pass" in high
    assert "no finite value" in khat_meaning(math.inf, 1000)


# ---- leaving one out


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_loo_is_that_of_a_normal_mean_whose_posterior_is_known(temperature):
    """y ~ N(mu, 1), mu ~ N(0, 4): by draws of the tempered posterior, and exactly."""
    rng = np.random.default_rng(0)
    y = rng.normal(0.5, 1.0, 20)
    precision = 1 / 4 + len(y) / temperature
    mu = rng.normal(y.sum() / temperature / precision, precision**-0.5, 4000)
    scores = -0.5 * (y - mu[:, None]) ** 2 - 0.5 * math.log(2 * math.pi)
    left = precision - 1 / temperature
    error = y - (y.sum() - y) / temperature / left
    variance = 1 + 1 / left
    exact = -0.5 * error**2 / variance - 0.5 * np.log(2 * math.pi * variance)
    found = leave_one_out(scores, temperature, tokens=40)
    assert found.elpd == pytest.approx(exact.sum(), abs=0.02)
    assert found.se == pytest.approx(exact.std() * len(y) ** 0.5, abs=0.02)
    assert (found.bad, found.limit, found.temperature) == (0, 0.7, temperature)
    learned = (np.logaddexp.reduce(scores, 0) - math.log(len(mu))).sum()
    assert found.elpd < learned - 0.1  # what was learned is no measure


def test_an_utterance_that_few_draws_explain_is_counted_as_bad():
    scores = np.random.default_rng(1).normal(-5.0, 0.1, (100, 4))
    scores[:, 3] *= 40
    found = leave_one_out(scores, 1.0, tokens=10)
    assert (found.bad, found.limit) == (0.25, 0.5)
    assert "k-hat is above 0.50 for 25% of the utterances, where a few draws" in loo_meaning(found)
    assert "for 0% of the utterances: no few" in loo_meaning(replace(found, bad=0.0))


def test_loo_of_a_fit_is_at_the_temperature_of_the_whole_set(net, tiny_base, examples):
    posterior = on(net, "normal", scale=0.05)
    _, scores, tokens = at_draws(posterior, tiny_base, examples, draws=40)
    assert scores.shape == (40, 2)
    assert tokens == examples.num_tokens
    for nll in -scores.sum(1):
        assert nll > 0
    found = fit_khat(posterior, tiny_base, examples, beta=0.1, draws=40, of_utterances=10)
    assert (found.draws, found.utterances, found.of_utterances) == (40, 2, 10)
    assert found.loo == leave_one_out(scores, 0.1 * 5 * tokens, tokens)


def test_loo_is_said_per_token_too():
    assert loo_meaning(Loo(-1234.5, 67.8, 0.0, 0.5, 0.03, 1000)).startswith(
        "elpd -1,234.5 ± 67.8 nats (-1.234 a token) at temperature T = 0.03; k-hat"
    )
