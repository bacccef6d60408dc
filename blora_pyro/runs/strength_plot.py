"""The curve of one fit's strengths, drawn."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blora_pyro.errors import UserError
from blora_pyro.files import replace_file
from blora_pyro.plotting import BLACK, BLUE, GREY, SMALL, VERMILLION, label_axes, new_figure

SUFFIXES = (".png", ".pdf", ".svg")


def strength_plot(curve: Mapping[str, Any]) -> Figure:
    """New-domain error against backward error, in %: a point a strength, base and fit marked.

    Bars are the paired 95% intervals of forgetting, set upon the base's backward error.

    Args:
        curve: What `strength_curve` returns. Points without a rate are left out.
    """
    points = [
        (one["strength"], 100 * one["new_domain"]["rate"], 100 * one["backward_error"]["rate"])
        for one in curve["points"]
        if None not in (one["new_domain"]["rate"], one["backward_error"]["rate"])
    ]
    intervals = {one["strength"]: one["forgetting"]["interval"] for one in curve["points"]}
    title = f"One fit at every strength, by {curve['strength_by']} ({curve['split']} sets)"
    figure, axes = new_figure(title, 4.4)
    panel = axes[0][0]
    panel.plot([x for _, x, _ in points], [y for _, _, y in points], color=GREY, linewidth=1.2)
    start = points[0][2] if points else 0.0  # the base's error
    for strength, x, y in points:
        low, high = (start + 100 * end for end in intervals[strength])
        panel.vlines(x, low, high, color=GREY, linewidth=0.8, alpha=0.6)
        name, color, marker = LOOKS.get(strength, (None, BLUE, "o"))
        size = 5 if name is None else 9
        panel.plot(x, y, marker, color=color, markersize=size, label=name, linestyle="none")
        place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": SMALL}
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        panel.annotate(f"{strength:g}", (x, y), bbox=behind, **place)
    metric = curve["metric"].upper()
    x_label = f"error on the new domain, {curve['new_domain']}: {metric} in %"
    label_axes(panel, "", x_label, "backward error in % (bars: 95% interval of forgetting)")
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.margins(0.08)
    if points:
        panel.legend(fontsize=SMALL, frameon=False)
    return figure


LOOKS = {0.0: ("the base (strength 0)", BLACK, "*"), 1.0: ("the fit (strength 1)", VERMILLION, "D")}


def check_plot_file(file: Path) -> None:
    """Refuse a file that no picture is written to.

    Raises:
        UserError: By its suffix.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"plot is '{file}'; give a file that ends in {' or '.join(SUFFIXES)}")


def save_strength_plot(file: Path, curve: Mapping[str, Any]) -> None:
    """Write the picture, in the place of what is there.

    Raises:
        UserError: If it can't be written.
    """
    check_plot_file(file)
    content = io.BytesIO()
    strength_plot(curve).savefig(content, format=file.suffix[1:], dpi=200)
    try:
        replace_file(file, content.getvalue())
    except OSError as error:
        raise UserError(
            f"{file} can't be written ({error.strerror}); give another --plot"
        ) from None
