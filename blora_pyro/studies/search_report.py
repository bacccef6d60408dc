"""What is shown of a search: the picture of gain against forgetting, and the terminal's tables."""

import shlex
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from blora_pyro.errors import UserError
from blora_pyro.files import write_json
from blora_pyro.plotting import BLACK, GREY, SMALL, TEXT, VERMILLION, label_axes, new_figure
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.estimates import BACKWARD
from blora_pyro.studies.search import Search, errors_of
from blora_pyro.studies.standings import FORGETTING
from blora_pyro.studies.trials import DATABASE
from blora_pyro.tables import Part, Percent, Table, figure_columns

RESULT, PLOT = "sweep.json", "sweep.png"


def search_plot(found: Search) -> Figure:
    """All trials by their two dev errors in percent: a panel for everything that was searched.

    The colour says its value. The line is the front, the ring the knee, the cross the base.
    """
    columns = min(2, len(found.ranges))
    rows = -(-len(found.ranges) // columns)
    best = found.knee
    assert best is not None
    new, old = (f"{100 * error:.1f}%" for error in errors_of(best))
    title = f"Errors on the dev sets; the knee, trial {best['number']}: {new} new, {old} backward"
    figure, axes = new_figure(title, 0.9 + 2.8 * rows, rows, columns, sharex=True, sharey=True)
    for panel, name in zip(axes.flat, found.ranges, strict=False):
        _trials(figure, panel, found, name)
    for panel in axes.flat[len(found.ranges) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("backward error in %", fontsize=TEXT)
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 4, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, **place)
    return figure


def _trials(figure: Figure, panel: Any, found: Search, name: str) -> None:
    """A panel, coloured by the value of `name`."""
    front = _percents(found.front)
    line = {"color": GREY, "linewidth": 1, "linestyle": "--"}
    panel.plot(*front, drawstyle="steps-post", label="Pareto front", zorder=1, **line)
    dots = panel.scatter(
        *_percents(found.trials),
        c=[one["values"][name] for one in found.trials],
        norm=LogNorm(*found.ranges[name]),
        cmap="viridis",
        s=26,
        edgecolors=BLACK,
        linewidths=0.4,
        zorder=2,
        label="trial",
    )
    ring = {"s": 110, "facecolors": "none", "edgecolors": VERMILLION, "linewidths": 1.6}
    panel.scatter(*_percents([found.knee]), zorder=3, label="knee", **ring)
    panel.scatter(*_percents([found.base]), marker="X", s=50, color=BLACK, label="base", zorder=3)
    label_axes(panel, f"colour: {name.replace('_', ' ')}", "new-domain error in %")
    panel.grid(alpha=0.25, linewidth=0.5)
    figure.colorbar(dots, ax=panel).ax.tick_params(labelsize=SMALL)


def _percents(fits: Iterable[Any]) -> tuple[list[float], list[float]]:
    """Return new-domain errors, and backward errors."""
    errors = np.array([errors_of(one) for one in fits])
    return tuple((100 * errors).T)


# ---- for the terminal


def write_search(found: Search) -> list[Part]:
    """Write `sweep.json` and the picture into the output of a search; return its tables."""
    try:
        write_json(found.output / RESULT, found.to_json())
        if found.trials:
            search_plot(found).savefig(found.output / PLOT, dpi=200)
    except OSError as error:
        raise UserError(
            f"output '{found.output}' can't be written ({error.strerror}); put that right and "
            "start the same command again: no trial is lost"
        ) from None
    return search_tables(found)


def search_tables(found: Search) -> list[Part]:
    """The front with its knee, and the base; what has come to no end; how to fit like the knee."""
    count = len(found.trials)
    counts = [f"{count} trial{'s' if count != 1 else ''} finished"]
    counts += [f"{len(found.diverged)} diverged"] if found.diverged else []
    counts += [f"{found.running} running in other processes"] if found.running else []
    if found.knee is None:
        return ["; ".join(counts)]
    run = shlex.quote(str(found.output / found.knee["folder"]))
    lines = [
        f"{'; '.join(counts)}; picture: {found.output / PLOT}",
        f"* is the knee of the front; on its test sets: blora-pyro evaluate {run}",
        f"to fit it again: {found.command(found.knee)}",
    ]
    if (database := found.output / DATABASE).exists():
        lines.append(
            f"to look at all trials: optuna-dashboard sqlite:///{shlex.quote(str(database))}"
        )
    return [_front_table(found), *lines]


def _front_table(found: Search) -> Table:
    title = "Pareto front on the dev sets: error in % [95% interval]"
    heads = ("trial", *found.ranges, "new domain", "backward average", "forgetting")
    names = [name.replace("_", " ") for name in heads]
    table = Table(figure_columns(*names, wrap=True), title, grid=True)
    for one in found.front:
        mark = "*" if one is found.knee else ""
        values = [f"{one['values'][name]:.3g}" for name in found.ranges]
        errors = [Percent.of(one[name]) for name in (NEW_DOMAIN, BACKWARD, FORGETTING)]
        table.add_row(f"{mark}{one['number']}", *values, *errors, emphasis="bold" if mark else "")
    if found.base:
        table.add_section()
        errors = [Percent.of(found.base[name]) for name in (NEW_DOMAIN, BACKWARD)]
        table.add_row("base", *("" for _ in found.ranges), *errors, "")
    return table
