import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blora_pyro.plotting import WIDTH, Axis, label_axes, new_figure, tick_at_1_2_5


def test_a_figure_is_as_wide_as_a_page_and_unknown_to_pyplot():
    before = plt.get_fignums()
    figure, axes = new_figure("a title", 2.5, 2, 3)
    assert axes.shape == (2, 3)
    assert figure.get_size_inches() == pytest.approx([WIDTH, 2.5])
    assert figure.get_suptitle() == "a title"
    assert plt.get_fignums() == before


def test_axes_have_their_labels():
    _, axes = new_figure("", 2)
    label_axes(axes[0][0], "panel", "steps", "nats")
    panel = axes[0][0]
    assert panel.get_title(loc="left") == "panel"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("steps", "nats")
    assert not panel.spines["top"].get_visible()


def test_a_short_logarithmic_axis_has_ticks_at_1_2_and_5():
    figure, axes = new_figure("", 2)
    panel = axes[0][0]
    panel.set_xscale("log")
    panel.set_xlim(1, 10)
    tick_at_1_2_5(panel.xaxis)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert [text for text in labels if text in ("1", "2", "5", "10")] == ["1", "2", "5", "10"]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=9))
def test_an_axis_holds_its_values_between_round_ends(values):
    axis = Axis.over(values)
    assert 2 <= len(axis.ticks) <= 9 and list(axis.ticks) == sorted({*axis.ticks})
    known = sorted(one for one in values if one is not None)
    low, high = axis.ticks[0], axis.ticks[-1]
    spare = 1e-6 * (high - low)  # a page draws no finer
    assert all(low - spare <= one <= high + spare for one in known)
    places = [axis.at(one) for one in known]
    assert places == sorted(places)
    assert (axis.at(axis.ticks[0]), axis.at(axis.ticks[-1])) == (0, 100)


def test_an_axis_has_ticks_at_round_numbers():
    assert Axis.over([0, 0.17, 43.2]).ticks == (0, 10, 20, 30, 40, 50)
    assert Axis.over([-34.1, 0]).ticks == (-40, -30, -20, -10, 0)
    assert Axis.over([3.0, 3.0]).ticks[0] == 2 and Axis.over([3.0, 3.0]).ticks[-1] == 4
    assert Axis.over([]).at(0) == 50
