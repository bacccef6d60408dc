import copy

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import ESTIMATORS, BLoRA, Temper, build_estimator


@pytest.fixture
def leaky(net):
    """A net that would drop activations and whole layers in training mode."""
    config = copy.deepcopy(net.config)
    for part in ("", "activation_", "attention_"):
        setattr(config, f"{part}dropout", 0.5)
    config.encoder_layerdrop = config.decoder_layerdrop = 0.5
    leaky = type(net)(config).eval()
    leaky.load_state_dict(net.state_dict())
    return leaky


def gradients(net, batch, checkpointing, estimator="shared", **options):
    """Gradients of one draw, and how often each layer's fc1 was called."""
    pyro.set_rng_seed(1)
    model = BLoRA(
        net, build_prior("normal"), rank=4, gradient_checkpointing=checkpointing, **options
    )
    guide, calls = build_guide("normal", model), []
    with torch.no_grad():
        for mean in guide.means.values():
            mean += 0.1 * torch.randn_like(mean)
    layers = [*net.model.encoder.layers, *net.model.decoder.layers]
    hooks = [
        layer.fc1.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(layers)
    ]
    temper = Temper(1e-3)
    with build_estimator(estimator):
        loss = TraceMeanField_ELBO().differentiable_loss(temper(model), temper(guide), batch)
    loss.backward()
    model.adapters.remove()
    for hook in hooks:
        hook.remove()
    values = {name: parameter.grad for name, parameter in guide.named_parameters()}
    return loss, values, [calls.count(number) for number in range(len(layers))]


def assert_same(found, expected):
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradients_are_those_without_it(leaky, batch, estimator):
    loss, plain, calls = gradients(leaky, batch, False, estimator)
    assert calls == [1, 1, 1, 1]
    state = torch.get_rng_state()
    again, checkpointed, calls = gradients(leaky, batch, True, estimator)
    assert calls == [2, 2, 2, 2]  # forward, and once more in backward
    assert torch.equal(again, loss)
    assert_same(checkpointed, plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_they_are_in_half_precision_and_under_autocast(leaky, batch, dtype):
    half = copy.deepcopy(leaky).to(dtype)
    assert_same(gradients(half, batch, True)[1], gradients(half, batch, False)[1])
    options = {"autocast": dtype}
    cast = [gradients(leaky, batch, flag, **options)[1] for flag in (True, False)]
    assert_same(*cast)


def test_the_net_is_left_in_eval_mode_with_its_dropout(leaky, batch, caplog):
    before = leaky.config.to_dict()
    gradients(leaky, batch, True)
    assert leaky.config.to_dict() == before
    assert "Caching is incompatible" not in caplog.text
    assert not any(module.training for module in leaky.modules())
    for layer in (*leaky.model.encoder.layers, *leaky.model.decoder.layers):
        assert (layer.dropout, layer.activation_dropout) == (0.5, 0.5)
    calls = gradients(leaky, batch, False)[2]
    assert calls == [1, 1, 1, 1]  # another model on the same net is not checkpointed
    leaky.train()
    assert leaky.model.decoder.layers[0].self_attn.training


def test_it_does_not_disturb_generation(leaky, batch):
    expected = leaky.generate(batch.input_features, max_new_tokens=5)
    gradients(leaky, batch, True)
    assert torch.equal(leaky.generate(batch.input_features, max_new_tokens=5), expected)
