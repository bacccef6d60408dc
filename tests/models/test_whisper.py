import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from torch.nn import functional

from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import IGNORED, Batch
from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES, GUIDES
from blora_pyro.guides import build_guide, build_prior, normal
from blora_pyro.models import BLoRA, Temper, WhisperLikelihood

from ..conftest import inform

ALL_GUIDES = pytest.mark.parametrize("name", GUIDES)
SHAPES = {
    "A_16x16": (24, 4, 16),  # 4 attention projections of 2 encoder and 2 · 2 decoder attentions
    "B_16x16": (24, 16, 4),
    "A_32x16": (4, 4, 16),
    "B_32x16": (4, 32, 4),
    "A_16x32": (4, 4, 32),
    "B_16x32": (4, 16, 4),
}


def own_prior(guide, net):
    """The prior of the guide's family; `point` and `auto-normal` have none of their own."""
    groups = group_by_shape(find_targets(net, "all-linear"), 2)
    return inform(build_prior(guide if guide in FAMILIES else "normal"), groups)


@pytest.fixture
def model(net):
    return BLoRA(net, normal.Prior(0.3), rank=4, alpha=8.0)


def base_logits(net, batch):
    with torch.no_grad():
        return net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits


def trace(model, batch):
    traced = poutine.trace(model).get_trace(batch)
    traced.compute_log_prob()
    return traced


def factors_of(model, traced):
    return {site.name: traced.nodes[site.name]["value"] for site in model.sites}


def test_sites_of_a_trace_are_as_documented(model, batch):
    nodes = trace(model, batch).nodes
    latent = [name for name in nodes if name[:2] in ("A_", "B_")]
    assert latent == [site.name for site in model.sites] == list(SHAPES)
    for name, shape in SHAPES.items():
        assert nodes[name]["value"].shape == shape
        assert nodes[name]["fn"].batch_shape == shape[:1]
        assert nodes[name]["fn"].event_shape == shape[1:]
        assert nodes[name]["log_prob"].shape == shape[:1]
        assert not nodes[name]["is_observed"]
        assert nodes[name]["value"].dtype == torch.float32
    assert nodes["tokens"]["is_observed"]
    assert nodes["tokens"]["log_prob"].shape == batch.labels.shape
    assert nodes["_RETURN"]["value"].shape == (*batch.labels.shape, model.net.config.vocab_size)
    assert model.num_weights == sum(map(math.prod, SHAPES.values()))


def test_the_number_of_sites_does_not_grow_with_depth(net, batch):
    config = copy.deepcopy(net.config)
    config.encoder_layers = config.decoder_layers = 4
    deep = type(net)(config)
    samples = []
    for depth in (net, deep):
        nodes = trace(BLoRA(depth, normal.Prior(), rank=2), batch).nodes
        samples.append([name for name, node in nodes.items() if node["type"] == "sample"])
    assert samples[0] == samples[1]
    latent = [name for name in samples[0] if name[:2] in ("A_", "B_")]
    assert len(latent) == 6


def test_only_the_target_layers_get_factors(net, batch):
    model = BLoRA(net, normal.Prior(), rank=2, target_modules="q_proj,v_proj")
    assert [site.name for site in model.sites] == ["A_16x16", "B_16x16"]
    assert all(name.endswith(("q_proj", "v_proj")) for name in model.groups[0].modules)
    with pytest.raises(UserError, match="nothing"):
        BLoRA(net, normal.Prior(), target_modules="nothing")
    with pytest.raises(UserError, match="rank 17"):
        BLoRA(net, normal.Prior(), rank=17)


@ALL_GUIDES
def test_svi_never_moves_the_frozen_whisper(name, net, batch):
    model = BLoRA(net.train(), own_prior(name, net), rank=2)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    guide, temper = build_guide(name, model), Temper(1e-3)
    svi = SVI(
        temper(model), temper(guide), pyro.optim.Adam({"lr": 0.05}), loss=TraceMeanField_ELBO()
    )
    guide(batch)
    start = {key: value.clone() for key, value in guide.mean().items()}
    for _ in range(4):
        assert math.isfinite(svi.step(batch))
    assert all((guide.mean()[key] != start[key]).any() for key in start)  # the guide did move
    assert not any("whisper" in key for key in pyro.get_param_store())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@ALL_GUIDES
def test_the_mean_at_the_start_is_the_base(name, net, batch):
    base = base_logits(net, batch)
    model = BLoRA(net, own_prior(name, net), rank=4)
    guide = build_guide(name, model)
    guide(batch)
    mean = guide.mean()
    assert {site.name: site.shape for site in model.sites} == {
        key: tuple(value.shape) for key, value in mean.items()
    }
    logits = poutine.condition(model, data=mean)(batch)
    torch.testing.assert_close(logits, base, atol=1e-6, rtol=0)
    assert any(value.abs().max() > 0 for value in mean.values())  # but not the saddle A = B = 0


@pytest.mark.parametrize("with_guide", [False, True])
def test_predictive_without_labels_draws_tokens(model, batch, with_guide):
    unlabelled = Batch(batch.input_features, batch.decoder_input_ids, None)
    guide = normal.Guide(model) if with_guide else None
    draws = Predictive(model, guide=guide, num_samples=5)(unlabelled)
    tokens = draws["tokens"]
    assert tokens.shape == (5, *batch.decoder_input_ids.shape)
    assert tokens.min() >= 0
    assert tokens.max() < model.net.config.vocab_size
    assert not (tokens == tokens[0]).all()


def test_predictive_draws_the_factors_from_the_prior(model, batch):
    unlabelled = Batch(batch.input_features, batch.decoder_input_ids, None)
    draws = Predictive(model, num_samples=2)(unlabelled)
    for name, shape in SHAPES.items():
        assert draws[name].shape == (2, 1, *shape)  # Pyro aligns plates: `tokens` has two
        assert draws[name].std() == pytest.approx(0.3, rel=0.1)


def test_nll_is_the_cross_entropy_under_the_same_factors(model, batch):
    traced = trace(model, batch)
    nll = -traced.nodes["tokens"]["log_prob_sum"]
    with model.adapters.using(factors_of(model, traced)):
        logits = base_logits(model.net, batch)
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-6)


def test_prompt_and_padding_positions_do_not_count(model, batch):
    traced = trace(model, batch)
    ignored = batch.labels == IGNORED
    log_prob = traced.nodes["tokens"]["log_prob"]
    assert (log_prob[ignored] == 0).all()
    assert (log_prob[~ignored] < 0).all()

    inputs = batch.decoder_input_ids.clone()
    inputs[2, 4:] = (inputs[2, 4:] + 1) % model.net.config.vocab_size  # other padding
    padded = Batch(batch.input_features, inputs, batch.labels)
    other = trace(poutine.condition(model, data=factors_of(model, traced)), padded)
    torch.testing.assert_close(other.nodes["tokens"]["log_prob"], log_prob)


def test_padding_columns_change_nothing(model, batch):
    """The mean is over target tokens, however wide the batch is padded."""
    traced = trace(model, batch)
    wide = Batch(
        batch.input_features,
        functional.pad(batch.decoder_input_ids, (0, 3), value=1),
        functional.pad(batch.labels, (0, 3), value=IGNORED),
    )
    other = trace(poutine.condition(model, data=factors_of(model, traced)), wide)
    torch.testing.assert_close(
        other.nodes["tokens"]["log_prob_sum"], traced.nodes["tokens"]["log_prob_sum"]
    )


def test_every_adapted_layer_computes_the_updated_weight(model, batch):
    seen = {}
    for group in model.groups:
        for name in group.modules:
            model.net.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    factors = factors_of(model, trace(model, batch))
    assert len(seen) == sum(len(group.modules) for group in model.groups)
    for group in model.groups:
        for i, name in enumerate(group.modules):
            layer = model.net.get_submodule(name)
            delta = 8.0 / 4 * factors[group.B.name][i] @ factors[group.A.name][i]
            x, output = seen[name]
            expected = functional.linear(x, layer.weight + delta, layer.bias)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def backward(model, guide, batch):
    """Gradients of the NLL by the guide's parameters, always with the same draw."""
    pyro.set_rng_seed(5)
    temper = Temper(0.0)
    loss = TraceMeanField_ELBO().differentiable_loss(temper(model), temper(guide), batch)
    guide.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in guide.named_parameters()}


def test_autocast_stays_near_float32_and_keeps_float32_gradients(net, batch):
    exact = BLoRA(net, normal.Prior(), rank=4)
    guide = normal.Guide(exact)
    with torch.no_grad():
        for mean in guide.means.values():
            mean += 0.05 * torch.randn_like(mean)
    cast = copy.copy(exact)
    cast.likelihood = WhisperLikelihood(exact.net, autocast=torch.bfloat16)
    mean = guide.mean()
    logits, rough = (poutine.condition(model, data=mean)(batch) for model in (exact, cast))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, logits)  # autocast was on
    assert (rough - logits).abs().mean() < 0.03 * logits.std()
    fine, coarse = backward(exact, guide, batch), backward(cast, guide, batch)
    for name, gradient in coarse.items():
        assert gradient.dtype == torch.float32
        assert (gradient - fine[name]).norm() < 0.15 * fine[name].norm()


def test_autocast_to_another_half_precision_than_the_bases_is_refused(net):
    for dtype in (torch.float32, torch.bfloat16):
        BLoRA(net.to(dtype), normal.Prior(), rank=2, autocast=torch.bfloat16)
    with pytest.raises(UserError, match=r"float16, and precision asks for bfloat16; give .*fp32"):
        BLoRA(net.half(), normal.Prior(), rank=2, autocast=torch.bfloat16)
