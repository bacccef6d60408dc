import pytest

from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.layers import LayerPosition, layer_grid, layer_kinds, summarise_kinds

from .conftest import fitted

DECODER = "model.decoder.layers.11."
POSITIONS = {
    "model.encoder.layers.0.self_attn.q_proj": ("encoder q_proj", "encoder 0", "q"),
    f"{DECODER}self_attn.out_proj": ("decoder out_proj", "decoder 11", "out"),
    f"{DECODER}encoder_attn.k_proj": ("cross k_proj", "decoder 11", "cross k"),
    f"{DECODER}fc2": ("decoder fc2", "decoder 11", "fc2"),
    "somewhere.else.linear": ("other linear", "other", "linear"),
}


@pytest.mark.parametrize(("module", "expected"), POSITIONS.items())
def test_a_position_is_read_from_the_name_of_a_layer(module, expected):
    position = LayerPosition.of(module)
    assert (position.kind, position.block, position.column) == expected
    assert position.label == f"{position.block} {position.column}"


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
    assert sorted(reversed(modules), key=lambda name: LayerPosition.of(name).order) == modules
    blocks, columns, spots = layer_grid(reversed(modules))
    assert blocks == ["encoder 0", "encoder 2", "encoder 10", "decoder 0", "other"]
    assert columns == ["q", "k", "out", "cross q", "else", "fc1", "fc2"]
    assert spots[modules[4]] == (2, 5) and spots[modules[6]] == (3, 3)


def test_kinds_are_listed_once_encoder_first(net):
    names = [name for name, module in net.named_modules() if hasattr(module, "in_features")]
    found = layer_kinds(names[:-1])  # the last is the output layer
    assert found[:6] == [
        f"encoder {p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ]
    assert found[6:12] == [name.replace("encoder", "decoder") for name in found[:6]]
    assert found[12:] == [f"cross {p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")]


def test_figures_of_kinds_add_up(finished_run):
    summary = summarise(finished_run.posterior)
    kinds = summarise_kinds(summary)
    assert sum(row.layers for row in kinds) == len(summary.updates)
    assert sum(sum(row.kl.values()) for row in kinds) == pytest.approx(summary.kl)
    assert sum(row.kl_share for row in kinds) == pytest.approx(1)
    (row,) = [row for row in kinds if row.kind == "cross v_proj"]
    rows = [one for one in summary.factors if LayerPosition.of(one.module).kind == "cross v_proj"]
    assert row.layers == 2 and len(rows) == 4
    of_a = [one for one in rows if one.factor == "A"]
    assert row.contraction["A"] == pytest.approx(sum(one.contraction for one in of_a) / 2)
    assert row.kl["A"] == pytest.approx(sum(one.kl for one in of_a))
    assert row.near_zero == pytest.approx(sum(one.near_zero for one in rows) / 4)
    weights = sum(one.weights for one in rows)
    assert row.kl_per_weight == pytest.approx(sum(one.kl for one in rows) / weights)
    assert row.active_ranks == {"A": None, "B": None}


def test_kinds_of_points_have_no_figures_of_spread():
    for row in summarise_kinds(summarise(fitted("normal", "point"))):
        assert row.contraction == row.signal_to_noise == row.kl == {"A": None, "B": None}
        assert row.kl_share is row.kl_per_weight is row.directions is None
    for row in summarise_kinds(summarise(fitted("a-only"))):
        assert row.kl["A"] > 0 and row.kl["B"] is None
        assert row.directions is not None
