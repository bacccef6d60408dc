import pytest

from blora_pyro.sweeps.plot import sweep_plot
from blora_pyro.sweeps.sweeping import Sweep
from blora_pyro.sweeps.trials import Trial

ERRORS = [(0.10, 0.10), (0.12, 0.08), (0.14, 0.06), (0.30, 0.055), (0.30, 0.09)]


def rate(value):
    return {"rate": value, "interval": [value - 0.01, value + 0.01]}


def made_up(tmp_path, ranges):
    trials = tuple(
        Trial(
            number,
            f"trial-{number}",
            {name: low * 2**number for name, (low, _) in ranges.items()},
            *map(rate, errors),
            {"difference": 0.01, "interval": [-0.01, 0.03]},
            {"A": 0.5, "B": 0.5, "delta_w": 0.5},
            1.0,
        )
        for number, errors in enumerate(ERRORS)
    )
    base = {"new_domain": rate(0.5), "backward": rate(0.05)}
    return Sweep(tmp_path, "study", {}, ranges, base, trials)


@pytest.mark.parametrize(
    ("names", "panels"),
    [(["beta"], 1), (["beta", "prior_scale"], 2), (["beta", "prior_scale", "lr"], 3)],
)
def test_there_is_a_panel_for_everything_that_was_searched(tmp_path, names, panels):
    figure = sweep_plot(made_up(tmp_path, {name: (1e-3, 1.0) for name in names}))
    seen = [axes for axes in figure.axes if axes.get_title("left")]
    titles = [axes.get_title("left") for axes in seen]
    assert titles == [f"colour: {name.replace('_', ' ')}" for name in names]
    assert len(seen) == panels


def test_all_trials_the_front_the_knee_and_the_base_are_drawn(tmp_path):
    found = made_up(tmp_path, {"beta": (1e-3, 1.0)})
    figure = sweep_plot(found)
    panel = figure.axes[0]
    drawn = {one.get_label(): one.get_offsets().tolist() for one in panel.collections}
    assert drawn["trial"] == [[100 * x, 100 * y] for x, y in ERRORS]
    assert drawn["knee"] == [pytest.approx([14, 6])]
    assert drawn["base"] == [pytest.approx([50, 5])]
    (front,) = [line for line in panel.lines if line.get_label() == "Pareto front"]
    assert front.get_xdata() == pytest.approx([10, 12, 14, 30])
    dots = next(one for one in panel.collections if one.get_label() == "trial")
    assert dots.get_array().tolist() == [0.001, 0.002, 0.004, 0.008, 0.016]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["Pareto front", "base", "knee", "trial"]
