import torch

from blora_pyro.data import Examples, read_manifest
from blora_pyro.models import encoder_states
from blora_pyro.models.encoder import encode
from blora_pyro.models.encoder_states import EncoderStates, last_states, states_of, weights_hash


def test_states_are_computed_once_each():
    states, asked = EncoderStates(3, (2, 4), torch.float32), []

    def compute(missing):
        asked.append(missing)
        return torch.stack([torch.full((2, 4), float(index)) for index in missing])

    assert states.of([2, 0, 2], compute)[:, 0, 0].tolist() == [2, 0, 2]
    assert states.of([1, 2], compute)[:, 0, 0].tolist() == [1, 2]
    assert asked == [[2, 0], [1]]


def test_the_last_states_are_those_of_the_encoder(fluent_base, tones_folder, monkeypatch):
    rows = read_manifest(tones_folder / "train.jsonl")
    examples = Examples(rows, fluent_base.feature_extractor, fluent_base.tokenizer)
    expected = encode(fluent_base.net, examples.features[[1, 0]])
    known = fluent_base.net, examples.fingerprint, examples.features
    assert torch.allclose(last_states(*known, [1, 0]), expected, atol=1e-5)
    monkeypatch.setattr(encoder_states, "encode", None)  # they are there
    assert torch.equal(last_states(*known, [0]), last_states(*known, [1, 0])[[1]])


def test_without_room_they_are_computed_each_time(fluent_base, monkeypatch):
    monkeypatch.setattr(encoder_states, "_kept", {})
    monkeypatch.setenv("BLORA_PYRO_CACHE", "/dev/null/no-folder")
    features = torch.randn(2, fluent_base.net.config.num_mel_bins, 100)
    assert last_states(fluent_base.net, "x", features, [1]).shape[0] == 1


def test_weights_that_are_changed_in_place_have_another_hash(fluent_base):
    net = fluent_base.net
    before, file = weights_hash(net), states_of(net, 1, "x")
    assert weights_hash(net) == before and states_of(net, 1, "x") is file
    with torch.no_grad():
        net.model.encoder.layers[0].fc1.weight.add_(1)
    assert weights_hash(net) != before and states_of(net, 1, "x") is not file


def test_the_oldest_files_are_given_up(fluent_base, monkeypatch):
    monkeypatch.setattr(encoder_states, "_kept", {})
    monkeypatch.setattr(encoder_states, "MOST_FILES", 2)
    first, second = (states_of(fluent_base.net, 1, name) for name in "ab")
    assert states_of(fluent_base.net, 1, "a") is first
    states_of(fluent_base.net, 1, "c")
    assert states_of(fluent_base.net, 1, "a") is first
    assert states_of(fluent_base.net, 1, "b") is not second
