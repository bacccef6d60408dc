import copy

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import find_targets
from blora_pyro.guides import build_prior
from blora_pyro.models import BLoRA
from blora_pyro.models.encoder import encode, first_adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_those_of_transformers_to_the_bit(net, batch, dtype):
    net.to(dtype)
    expected = net.get_encoder()(batch.input_features.to(dtype)).last_hidden_state
    assert torch.equal(encode(net, batch.input_features), expected)


def test_a_shorter_window_is_that_of_a_whisper_with_fewer_positions(net, batch):
    config = copy.deepcopy(net.config)
    config.max_source_positions = 30
    short = WhisperForConditionalGeneration(config).eval()
    weights = net.state_dict()
    weights["model.encoder.embed_positions.weight"] = net.model.encoder.embed_positions.weight[:30]
    short.load_state_dict(weights)
    features = batch.input_features[..., :60]
    expected = short.get_encoder()(features).last_hidden_state
    assert torch.equal(encode(net, features), expected)
    assert expected.shape == (3, 30, 16)


@pytest.mark.parametrize(
    ("targets", "first"),
    [
        ("all-linear", 0),
        (r".*decoder.*", 2),
        (r"model\.encoder\.layers\.1\.fc2", 1),
        (r".*(encoder\.layers\.1|decoder\.layers\.0).*", 1),
        ("encoder_attn.q_proj", 2),
    ],
)
def test_the_first_adapted_layer(net, batch, targets, first):
    assert first_adapted(net, find_targets(net, targets)) == first
    model = BLoRA(net, build_prior("normal"), rank=2, target_modules=targets)
    before = model.likelihood.frozen_states(batch.input_features)
    expected = net.get_encoder()(batch.input_features, output_hidden_states=True).hidden_states
    if first < 2:  # transformers' last ones are after the layer norm
        assert torch.equal(before, expected[first])
    else:
        assert torch.equal(net.model.encoder.layer_norm(before), expected[first])
