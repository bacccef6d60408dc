import pytest

from blora_pyro.diagnostics.layers import Place, kinds

DECODER = "model.decoder.layers.11."
PLACES = {
    "model.encoder.layers.0.self_attn.q_proj": ("encoder q_proj", "encoder 0", "q"),
    f"{DECODER}self_attn.out_proj": ("decoder out_proj", "decoder 11", "out"),
    f"{DECODER}encoder_attn.k_proj": ("cross k_proj", "decoder 11", "cross k"),
    f"{DECODER}fc2": ("decoder fc2", "decoder 11", "fc2"),
    "somewhere.else.linear": ("other linear", "other", "linear"),
}


@pytest.mark.parametrize(("module", "expected"), PLACES.items())
def test_a_place_is_read_from_the_name_of_a_layer(module, expected):
    place = Place.of(module)
    assert (place.kind, place.block, place.column) == expected
    assert place.label == f"{place.block} {place.column}"


def test_layers_sort_as_data_passes_them():
    modules = [
        "model.encoder.layers.0.self_attn.q_proj",
        "model.encoder.layers.0.self_attn.k_proj",
        "model.encoder.layers.0.fc1",
        "model.encoder.layers.2.fc1",
        "model.encoder.layers.10.fc1",
        "model.decoder.layers.0.self_attn.out_proj",
        "model.decoder.layers.0.encoder_attn.q_proj",
        "model.decoder.layers.0.fc1",
        "model.decoder.layers.0.fc2",
        "somewhere.else",
    ]
    assert sorted(reversed(modules), key=lambda name: Place.of(name).order) == modules


def test_kinds_are_listed_once_encoder_first(net):
    names = [name for name, module in net.named_modules() if hasattr(module, "in_features")]
    found = kinds(names[:-1])  # the last is the output layer
    assert found[:6] == [
        f"encoder {p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ]
    assert found[6:12] == [name.replace("encoder", "decoder") for name in found[:6]]
    assert found[12:] == [f"cross {p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")]
