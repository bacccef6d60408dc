"""What all plots share: page width, font sizes, a palette safe for colour-blind eyes, axes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette, https://jfly.uni-koeln.de/color
BLACK, GREY = "#000000", "#8c8c8c"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
SMALL, TEXT, TITLE = 8, 9, 10.5  # font sizes in points
WIDTH = 7.2  # width of a page in inches


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> Any:
    """Return a figure of page width with its title, and its axes, an array (rows, columns).

    The figure belongs to nobody else: neither pyplot nor anyone's rcParams are touched.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def label_axes(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Set title and axis labels, and hide the top and right spines."""
    axes.set_title(title, fontsize=TEXT, loc="left")
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def tick_at_1_2_5(axis: Any) -> None:
    """Set ticks at 1, 2 and 5 times powers of ten, for a logarithmic axis of few decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Axis:
    """An axis of a plot that a page draws itself: it begins and ends with a tick.

    Attributes:
        ticks: Two or more round numbers, rising.
    """

    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float | None], most: int = 6) -> "Axis":
        """Return an axis that holds the values that are known, in at most `most` steps."""
        known = [one for one in values if one is not None and math.isfinite(one)] or [0.0]
        low, high = min(known), max(known)
        if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
            low, high = low - 1, high + 1
        ticks = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
        return cls(tuple(round(float(one), 12) for one in ticks))

    def at(self, value: float) -> float:
        """Return how far from the low end a value is, in percent; what is beyond is at an end."""
        low, *_, high = self.ticks
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)
