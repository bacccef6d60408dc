"""The picture of a comparison: what every method gains, and what it forgets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from blora_pyro.metrics.pareto import pareto_front
from blora_pyro.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILLION,
    label_axes,
    new_figure,
)
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.estimates import BACKWARD
from blora_pyro.studies.methods import BASE
from blora_pyro.studies.standings import Row, Standing

HUES = {
    "base": BLACK,
    "full": GREY,
    "lora": BLUE,
    "regularised": SKY,
    "bayes": VERMILLION,
    "priors": ORANGE,
    "both": PURPLE,
}
MARKERS = "osD^vP*X<>hp"
HEIGHT = 4.6  # inches a setting
LABELS = 0.30  # of the panel's width, right of the points


def draw(standings: Sequence[Standing]) -> Figure:
    """New-domain error against backward error, a panel a setting; left and low is good.

    A line a method over the values of its knob, named at the chosen one, which is filled (at the
    first one where the chosen has no rows yet); methods of one family share a hue. The dotted line
    is the Pareto front: what no other point beats in both. The view is of the named values of what
    is adapted; the base, far to the right, is named with its error. A value that lacks a domain or
    seed of the method's chosen one is not drawn.

    Args:
        standings: One or more, each with results.
    """
    title = "What is gained, and what is forgotten: left and low is good"
    figure, axes = new_figure(title, HEIGHT * len(standings), len(standings))
    for panel, standing in zip(axes[:, 0], standings, strict=True):
        _panel(panel, standing)
    return figure


def _point(row: Row) -> tuple[float, float]:
    """New-domain and backward error in percent."""
    return 100 * (row[NEW_DOMAIN].share or 0.0), 100 * (row[BACKWARD].share or 0.0)


def _panel(panel: Any, standing: Standing) -> None:
    wanted = {one["name"]: {*one["repeats"]} for one in standing.chosen_results}
    drawn = [one for one in standing.results if wanted.get(one["name"], {*()}) <= {*one["repeats"]}]
    names = dict.fromkeys(one["name"] for one in drawn)
    curves = [[one for one in drawn if one["name"] == name] for name in names]
    seen = [next((one for one in curve if one["is_chosen"]), curve[0]) for curve in curves]
    adapted = [one for one in seen if one["name"] != BASE] or seen
    _view(panel, [_point(one)[0] for one in adapted], [_point(one)[1] for one in seen])
    labels = []
    for place, (curve, one) in enumerate(zip(curves, seen, strict=True)):
        look = {"color": HUES.get(one["family"], GREEN), "marker": MARKERS[place % len(MARKERS)]}
        line = np.array([_point(row) for row in curve])
        panel.plot(*line.T, **look, markerfacecolor="white", markersize=4, linewidth=0.8, alpha=0.7)
        if one["is_chosen"]:
            panel.plot(*_point(one), **look, markersize=6.5, linestyle="none", zorder=3)
        labels.append((_point(one), one["title"], look))
    points = [_point(one) for one in drawn]
    front = np.array([points[place] for place in pareto_front(points)])
    panel.step(*front.T, where="post", color=BLACK, linewidth=0.8, linestyle=":", zorder=1)
    _label(panel, labels)
    on = "" if standing.split == "test" else f" ({standing.split}: the choice alone)"
    x, y = "error on the new domain, %", "backward error, %"
    label_axes(panel, f"{standing.setting.title}{on}", x, y)
    panel.grid(alpha=0.2, linewidth=0.5)
    left = Rectangle((0, 0), 1 - LABELS + 0.04, 1, transform=panel.transAxes)
    for drawn_line in panel.lines:
        drawn_line.set_clip_path(left)  # not through the labels


def _view(panel: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Axes around the values, logarithmic where none is 0, with room for labels at the right."""
    for values, axis, room in ((xs, panel.xaxis, LABELS), (ys, panel.yaxis, 0.0)):
        low, high = min(values), max(values)
        set_limits = panel.set_xlim if axis is panel.xaxis else panel.set_ylim
        if low > 0:
            (panel.set_xscale if axis is panel.xaxis else panel.set_yscale)("log")
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
            span = max(np.log(high / low), 0.2)
            margin, width = 0.06 * span, span / (1 - room)
            set_limits(low * np.exp(-margin), low * np.exp(width + margin))
        else:
            span = max(high - low, 1.0)
            set_limits(low - 0.06 * span, low + span / (1 - room) + 0.06 * span)


def spaced(heights: Sequence[float]) -> list[float]:
    """Heights of labels in a panel from 0 to 1, none nearer to the next than can be read.

    Args:
        heights: Where they are wanted, rising.
    """
    gap = min(0.045, 1 / max(len(heights), 1))
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap if found else gap / 2))
    ceiling = 1 - gap / 2
    for place in reversed(range(len(found))):
        found[place] = min(found[place], ceiling)
        ceiling = found[place] - gap
    return found


def _label(panel: Any, chosen: Sequence[tuple[tuple[float, float], str, dict[str, Any]]]) -> None:
    """Names in a column at the right, as high as their points if that can be, with a line each."""
    repeats = sorted(chosen, key=lambda one: (one[0][1], one[0][0]))
    to_axes = panel.transData + panel.transAxes.inverted()
    heights = spaced([to_axes.transform(point)[1] for point, *_ in repeats])
    right = panel.get_xlim()[1]
    for height, (point, title, look) in zip(heights, repeats, strict=True):
        if outside := point[0] > right:
            title = f"{title}, at {point[0]:.1f}"
        panel.annotate(
            title,
            xy=point,
            annotation_clip=False,
            xycoords="data",
            xytext=(1 - LABELS + 0.06, height),
            textcoords="axes fraction",
            fontsize=SMALL - 1,
            color=look["color"],
            va="center",
            arrowprops=None
            if outside
            else {
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": look["color"],
                "linewidth": 0.4,
                "alpha": 0.6,
                "shrinkB": 3,
            },
        )
