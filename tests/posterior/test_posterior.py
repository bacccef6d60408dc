import copy
import math

import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import at_strength

from .conftest import adapted, logits, posterior_of


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


# ---- merging


def test_merging_gives_the_logits_of_the_posterior_mean(net, batch, posterior):
    merged = copy.deepcopy(net)
    posterior.merge(merged)
    ours = adapted(posterior, net, batch)
    torch.testing.assert_close(logits(merged, batch), ours, atol=1e-5, rtol=0)
    assert hooks(merged) == 0


def test_merging_adds_the_delta_weights_and_touches_nothing_else(net, posterior):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    posterior.merge(net)
    deltas = {f"{name}.weight": delta for name, delta in posterior.delta_weights()}
    for name, value in net.state_dict().items():
        expected = before[name] + deltas[name] if name in deltas else before[name]
        assert torch.equal(value, expected), name


# ---- applied


def test_applied_leaves_the_base_exactly_as_it_was_after_an_exception(net, batch, posterior):
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    before = logits(net, batch)
    with pytest.raises(RuntimeError, match="inside"), posterior.applied(net):
        assert not torch.equal(logits(net, batch), before)
        raise RuntimeError("inside")
    assert torch.equal(logits(net, batch), before)
    assert hooks(net) == 0
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_applied_takes_a_draw_instead_of_the_mean(net, batch, posterior):
    (draw,) = posterior.draws(1)
    moved = Posterior("tiny", posterior.groups, posterior.alpha, draw, posterior.stddev)
    drawn = adapted(posterior, net, batch, draw)
    assert torch.equal(drawn, adapted(moved, net, batch))
    assert not torch.equal(drawn, adapted(posterior, net, batch))


@pytest.mark.parametrize("difference", [{"d_model": 8}, {"decoder_layers": 1}])
def test_a_net_of_another_geometry_is_refused_and_left_alone(net, tmp_path, difference):
    config = WhisperConfig(**{**net.config.to_dict(), **difference})
    other = WhisperForConditionalGeneration(config).eval()
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    posterior = posterior_of(net)
    with pytest.raises(UserError, match="base model"), posterior.applied(other):
        pass
    with pytest.raises(UserError, match="base model"):
        posterior.merge(other)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert hooks(other) == 0


# ---- draws, delta weights, sparsity


def test_draws_have_the_sites_shapes_and_depend_on_the_seed_alone(posterior):
    state = torch.get_rng_state()
    first, again, other = (list(posterior.draws(3, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 3
    for group in posterior.groups:
        for site in group.sites:
            assert all(draw[site.name].shape == site.shape for draw in first)
            for one, two, three in zip(first, again, other, strict=True):
                assert torch.equal(one[site.name], two[site.name])
                assert not torch.equal(one[site.name], three[site.name])
            assert not torch.equal(first[0][site.name], first[1][site.name])


def test_draws_have_the_posteriors_mean_and_deviation(net):
    posterior = posterior_of(net, "fc1")
    count = 1000
    draws = list(posterior.draws(count))
    for name, mean in posterior.mean.items():
        stacked = torch.stack([draw[name] for draw in draws]).double()
        stddev = posterior.stddev[name]
        # About 400 elements each: six standard errors hold for all but one seed in a million.
        z = (stacked.mean(0) - mean) / stddev * math.sqrt(count)
        assert z.abs().max() < 6
        assert abs(float(z.square().mean()) - 1) < 0.5
        ratio = stacked.std(0) / stddev
        assert (ratio - 1).abs().max() < 6 / math.sqrt(2 * count)


def test_draws_of_a_point_are_the_mean(net):
    posterior = posterior_of(net)
    zero = {name: torch.zeros_like(value) for name, value in posterior.stddev.items()}
    point = Posterior("tiny", posterior.groups, posterior.alpha, posterior.mean, zero)
    (draw,) = point.draws(1)
    assert all(torch.equal(draw[name], mean) for name, mean in posterior.mean.items())


def test_delta_weights_are_alpha_over_rank_times_b_a(net, posterior):
    deltas = dict(posterior.delta_weights())
    assert posterior.scaling == 2.5
    assert len(deltas) == sum(len(group.modules) for group in posterior.groups)
    for group in posterior.groups:
        for place, name in enumerate(group.modules):
            a, b = posterior.mean[group.A.name][place], posterior.mean[group.B.name][place]
            assert deltas[name].shape == net.get_submodule(name).weight.shape
            torch.testing.assert_close(deltas[name], 2.5 * torch.einsum("or,ri->oi", b, a))


def test_it_prints_as_a_few_lines_and_as_sections_of_a_notebook(random_posterior):
    posterior = random_posterior(0)
    head, *lines = repr(posterior).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert head == "<blora_pyro.Posterior>"
    assert facts["prior"] == "normal (scale 0.5)"
    layers = sum(len(group.modules) for group in posterior.groups)
    size = f"{posterior.num_weights:,} weights in {layers} layers, rank 4"
    assert facts["adapter"] == size and "strength" not in facts
    assert "    strength  0.5" in repr(at_strength(posterior, 0.5)).splitlines()
    shown = posterior._repr_html_()
    assert "<summary>Layers by shape</summary>" in shown and "A_16x16, B_16x16" in shown
    assert posterior.groups[0].modules[0] in shown and len(shown) < 20_000


def test_rank_and_number_of_weights(net):
    posterior = posterior_of(net, "fc1,q_proj", rank=3)
    fc1, q_proj = 4 * 3 * (16 + 32), 6 * 3 * (16 + 16)  # 2 + 2 layers, and 2 + 2 · 2 attentions
    assert posterior.rank == 3
    assert posterior.num_weights == fc1 + q_proj


def test_sparsity_of_hand_made_values():
    groups = (Group(("one", "two"), 2, 3, 1), Group(("three",), 1, 2, 1))
    mean = {
        "A_2x3": torch.tensor([[[0.0, 0.5, -2e-3]], [[1e-4, 2.0, -9e-4]]]),  # 3 of 6 are small
        "B_2x3": torch.tensor([[[0.0], [1.0]], [[1e-3], [-1.0]]]),  # 1 of 4: 1e-3 itself is not
        "A_1x2": torch.tensor([[[5.0, 5.0]]]),  # 0 of 2
        "B_1x2": torch.tensor([[[1e-5]]]),  # 1 of 1
    }
    stddev = {name: torch.ones_like(value) for name, value in mean.items()}
    posterior = Posterior("made", groups, 2.0, mean, stddev)
    # ΔW = 2 B A. one: [0, 0, 0], [0, 1, -4e-3]: 4 of 6; two: [2e-7, 4e-3, -1.8e-6] and
    # [-2e-4, -4, 1.8e-3]: 3 of 6; three: [1e-4, 1e-4]: 2 of 2.
    assert posterior.sparsity() == {"A": 3 / 8, "B": 2 / 5, "delta_w": 9 / 14}
    assert posterior.sparsity(threshold=10) == {"A": 1, "B": 1, "delta_w": 1}
    assert posterior.sparsity(threshold=0) == {"A": 0, "B": 0, "delta_w": 0}
