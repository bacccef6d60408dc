import dataclasses

import numpy as np
import pytest
from matplotlib.colors import LogNorm

from blora_pyro.diagnostics import FactorSummary, Summary, UpdateSummary
from blora_pyro.diagnostics.heat_maps import active_rank_plot, kl_map, update_map

RANK = 4


def modules(layers):
    names = []
    for stack in ("encoder", "decoder"):
        for layer in range(layers):
            block = f"model.{stack}.layers.{layer}"
            attentions = ["self_attn"] + ["encoder_attn"] * (stack == "decoder")
            for attention in attentions:
                names += [f"{block}.{attention}.{p}_proj" for p in ("k", "v", "q", "out")]
            names += [f"{block}.fc1", f"{block}.fc2"]
    return names


def summary(layers=2):
    """KL of the n-th layer's A and B: n nats each; of its 100 weights half are in each."""
    factors = tuple(
        FactorSummary(name, factor, 50, 0.5, 1.0, 0.5, 0.1, float(n), n / 10, 0.05)
        for n, name in enumerate(modules(layers), start=1)
        for factor in "AB"
    )
    updates = tuple(
        UpdateSummary(name, float(n), n / 100, (1.0,) * RANK, (0.1,) * RANK, 2.0, 3)
        for n, name in enumerate(modules(layers), start=1)
    )
    return Summary("normal", {}, "normal", RANK, factors, updates, {})


def cells(figure, panel=0):
    (image,) = figure.axes[panel].get_images()
    return np.ma.filled(image.get_array(), np.nan)


def labels(ticks):
    return [label.get_text() for label in ticks]


def test_kl_is_shown_by_block_and_projection():
    figure = kl_map(summary())
    panel = figure.axes[0]
    assert labels(panel.get_yticklabels()) == [
        f"{s} {n}" for s in ("encoder", "decoder") for n in (0, 1)
    ]
    columns = ["q", "k", "v", "out", "cross\nq", "cross\nk", "cross\nv", "cross\nout", "fc1", "fc2"]
    assert labels(panel.get_xticklabels()) == columns
    found = cells(figure)
    assert found.shape == (4, 10)
    assert np.isnan(found[:2, 4:8]).all() and np.isfinite(np.delete(found, range(4, 8), 1)).all()
    assert found[0, 1] == 0  # encoder 0 k is the first layer, and its KL the floor
    assert found[3, 9] == pytest.approx(2 * (32 - 1) / 100)
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    assert len(texts) == 32
    assert (texts[1, 0], texts[9, 3]) == ("0", "62")
    title = figure.get_suptitle()
    assert "992 of 1,056 nats of KL are above the floor, most a weight in decoder 1 fc2" in title


def test_a_posterior_that_has_not_moved_is_told():
    even = summary()
    rows = tuple(dataclasses.replace(row, kl=3.0) for row in even.factors)
    title = kl_map(dataclasses.replace(even, factors=rows)).get_suptitle()
    assert title == "Deviations have not moved: all 192 nats of KL are their floor"


def test_skewed_values_are_coloured_by_their_logarithm():
    (image,) = kl_map(summary()).axes[0].get_images()
    assert isinstance(image.norm, LogNorm)
    even = summary()
    rows = tuple(dataclasses.replace(row, kl=1.0) for row in even.factors)
    (image,) = kl_map(dataclasses.replace(even, factors=rows)).axes[0].get_images()
    assert not isinstance(image.norm, LogNorm)


def test_updates_are_shown_relative_to_the_frozen_weights():
    figure = update_map(summary())
    assert cells(figure)[0, 1] == pytest.approx(1)  # percent
    assert "most in decoder 1 fc2" in figure.get_suptitle()
    unknown = summary()
    rows = tuple(dataclasses.replace(row, relative_norm=None) for row in unknown.updates)
    figure = update_map(dataclasses.replace(unknown, updates=rows))
    assert cells(figure)[3, 9] == pytest.approx(32)


def test_what_hardly_moved_has_no_digits():
    still = summary()
    rows = tuple(
        dataclasses.replace(row, relative_norm=1e-9 if n else 0.05)
        for n, row in enumerate(still.updates)
    )
    figure = update_map(dataclasses.replace(still, updates=rows))
    assert sorted({text.get_text() for text in figure.axes[0].texts}) == ["5.0", "<0.001"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_updates_can_be_drawn(value, tmp_path):
    still = summary()
    rows = tuple(dataclasses.replace(row, relative_norm=value) for row in still.updates)
    update_map(dataclasses.replace(still, updates=rows)).savefig(tmp_path / "a.png")


def test_a_large_model_gets_a_taller_map():
    small, large = kl_map(summary(2)), kl_map(summary(32))
    assert large.get_figheight() > 3 * small.get_figheight()
    assert cells(large).shape == (64, 10)


def shrinkage(layers):
    return {
        f"{factor} {name}": np.array([0.9, 0.1, 0.5, 1.0])
        for name in modules(layers)
        for factor in "AB"
    }


def test_ranks_are_sorted_by_how_open_they_are():
    figure = active_rank_plot(summary(), shrinkage(2))
    for panel, factor in enumerate("AB"):
        assert cells(figure, panel) == pytest.approx(np.tile([0.9, 0.5, 0.1, 0.0], (32, 1)))
        assert figure.axes[panel].get_title("left") == f"{factor}: 1.7 of 4 ranks active"
    rows = labels(figure.axes[0].get_yticklabels())
    assert (rows[0], rows[-1], len(rows)) == ("encoder 0 q", "decoder 1 fc2", 32)


def test_many_layers_are_averaged_by_kind():
    found = shrinkage(32)
    found["A model.encoder.layers.0.self_attn.q_proj"] = np.array([0.9])  # pruned to one rank
    figure = active_rank_plot(summary(32), found)
    assert cells(figure).shape == (16, RANK)
    assert cells(figure)[0] == pytest.approx([(31 * 0.9 + 0.1) / 32, 0.5, 0.1, 0.0])
    assert labels(figure.axes[0].get_yticklabels())[0] == "encoder q_proj"
