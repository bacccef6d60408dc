import dataclasses

import matplotlib
import numpy as np
import pytest

from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.densities import densities
from blora_pyro.diagnostics.plots import (
    all_plots,
    contraction_plot,
    density_plot,
    save_plots,
    singular_value_plot,
    trace_plot,
)
from blora_pyro.fitting.history import Step

from .conftest import SQUARE, TALL, fitted


@pytest.fixture(scope="module")
def posterior(finished_run):
    return finished_run.posterior


@pytest.fixture(scope="module")
def summary(posterior):
    return summarise(posterior)


def points(panel):
    """The single points of a panel; rules have two ends."""
    return [line for line in panel.lines if len(line.get_xdata()) == 1]


def test_contraction_has_a_point_a_layer_and_factor(summary):
    figure = contraction_plot(summary)
    panels = [axes for axes in figure.axes if points(axes)]
    assert [axes.get_title("left")[:7] for axes in panels] == ["encoder", "decoder", "decoder"]
    drawn = {
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "none")
        for axes in panels
        for line in points(axes)
    }
    assert drawn == {
        (max(row.signal_to_noise, 1e-4), row.contraction, row.factor == "A")
        for row in summary.factors
    }
    assert all(axes.get_xscale() == "log" for axes in panels)


def test_projections_differ_in_colour_and_in_shape(summary):
    figure = contraction_plot(summary)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
        "filled: A",
        "hollow: B",
    ]
    looks = [(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles[:6]]
    for distinct in zip(*looks, strict=True):
        assert len(set(distinct)) == 6


def test_factors_that_are_points_are_left_out_of_the_contraction():
    figure = contraction_plot(summarise(fitted("a-only")))
    drawn = [line for axes in figure.axes for line in points(axes)]
    assert len(drawn) == len(SQUARE + TALL)
    assert all(line.get_markerfacecolor() != "none" for line in drawn)


def test_densities_are_logarithmic_and_named(posterior, summary):
    found = densities(posterior, summary)
    figure = density_plot(found)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in panels] == [one.title for one in found]
    assert {axes.get_yscale() for axes in panels} == {"log"}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["posterior means", "prior", "posterior (draws)"]
    prior = next(line for line in panels[0].lines if line.get_label() == "prior")
    assert prior.get_ydata() == pytest.approx(found[0].prior)


def test_singular_values_have_intervals_for_the_layers_with_the_largest_update(summary):
    figure = singular_value_plot(summary)
    top = sorted(summary.updates, key=lambda row: -row.norm)[:6]
    assert len(figure.axes) == 6
    for axes, row in zip(figure.axes, top, strict=True):
        assert f"{row.directions} of 4" in axes.get_title("left")
        (dots,) = [c for c in axes.collections if len(c.get_offsets()) == 4]
        assert dots.get_offsets()[:, 1].tolist() == pytest.approx(row.singular_values)
        (bars,) = [c for c in axes.collections if hasattr(c, "get_segments")]
        low, high = bars.get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * 1.96 * row.singular_stddevs[0])


def test_few_layers_leave_no_empty_panel(summary):
    few = dataclasses.replace(summary, updates=summary.updates[:4])
    figure = singular_value_plot(few)
    assert [axes.get_visible() for axes in figure.axes] == [True] * 4 + [False] * 2
    one = dataclasses.replace(summary, updates=summary.updates[:1])
    assert len(singular_value_plot(one).axes) == 1


def steps(count, kl=1000.0):
    return [Step(i + 1, 2.0, 2.0 - i / count, kl, 1e-3, 10) for i in range(count)]


def test_the_trace_shows_both_parts_of_the_loss_and_their_running_means():
    figure = trace_plot(steps(100), 1e-3)
    nll, kl = figure.axes
    assert (nll.get_ylabel(), kl.get_ylabel()) == ("NLL, nats a token", "0.001 · KL, nats a token")
    raw, smooth = nll.lines
    assert raw.get_ydata() == pytest.approx(2 - np.arange(100) / 100)
    assert smooth.get_ydata()[50] == pytest.approx(1.5)  # a line stays what it is
    assert kl.lines[0].get_ydata() == pytest.approx(np.ones(100))


@pytest.mark.parametrize(("beta", "kl"), [(0.0, None), (1e-3, None)])
def test_without_kl_the_trace_is_the_nll_alone(beta, kl):
    assert len(trace_plot(steps(3, kl), beta).axes) == 1


def test_a_trace_of_one_step_can_be_drawn():
    trace_plot(steps(1), 1e-3).draw_without_rendering()


PLOTS = ["contraction", "kl", "updates", "densities", "singular_values", "trace"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (("normal",), PLOTS),
        (("horseshoe",), [*PLOTS, "active_ranks"]),
        (("a-only",), PLOTS),
        (("normal", "point"), ["updates", "densities", "singular_values", "trace"]),
    ],
)
def test_a_posterior_has_the_plots_that_make_sense(family, names, monkeypatch):
    monkeypatch.setattr("blora_pyro.diagnostics.densities.MOST_PRIOR_DRAWS", 5)
    posterior = fitted(*family)
    assert list(all_plots(posterior, summarise(posterior), steps(3), 1e-4)) == names


def test_without_history_there_is_no_trace(monkeypatch):
    monkeypatch.setattr("blora_pyro.diagnostics.densities.MOST_PRIOR_DRAWS", 5)
    posterior = fitted("normal")
    assert "trace" not in all_plots(posterior, summarise(posterior), [], 1e-4)


def test_plots_are_saved_as_png_and_pdf(tmp_path):
    before = dict.copy(matplotlib.rcParams)
    paths = save_plots(tmp_path, {"a": trace_plot(steps(9), 1e-3), "b": trace_plot(steps(1), 0.0)})
    assert [path.name for path in paths] == ["a.png", "a.pdf", "b.png", "b.pdf"]
    assert set(paths) == set(tmp_path.iterdir())
    starts = [path.read_bytes()[:5] for path in paths]
    assert starts == [b"\x89PNG\r", b"%PDF-"] * 2
    assert dict.copy(matplotlib.rcParams) == before


def test_no_letter_is_smaller_than_8_points(posterior, summary):
    from matplotlib.text import Text

    for figure in (
        contraction_plot(summary),
        density_plot(densities(posterior, summary)),
        singular_value_plot(summary),
        trace_plot(steps(9), 1e-3),
    ):
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 8
