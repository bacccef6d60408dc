"""Plots of a posterior: matplotlib figures that can be read in print, in grey, and colour-blind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from blora_pyro.diagnostics.densities import Densities, densities
from blora_pyro.diagnostics.heat_maps import active_rank_plot, kl_map, update_map
from blora_pyro.diagnostics.layers import PROJECTIONS, LayerPosition
from blora_pyro.diagnostics.summaries import Summary, UpdateSummary
from blora_pyro.fitting.history import Step
from blora_pyro.guides.contracts import shrinkage_of
from blora_pyro.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    TEXT,
    VERMILLION,
    label_axes,
    new_figure,
    tick_at_1_2_5,
)
from blora_pyro.posterior import Posterior

COLORS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE)
MARKERS = dict(zip(PROJECTIONS, zip(COLORS, "os^DPX", strict=True), strict=True))
PARTS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "cross": "decoder to encoder (cross)",
    "other": "other layers",
}
SMOOTHING = 0.05  # window of the running mean over the trace of a fit, as a share of its steps
TOP_LAYERS = 6  # layers whose singular values are plotted
CROWD = 300  # points from which on markers are small
LEGEND_BELOW: dict[str, Any] = {
    "loc": "outside lower center",
    "fontsize": SMALL,
    "frameon": False,
}


def contraction_plot(summary: Summary) -> Figure:
    """Plot contraction against signal-to-noise, a marker a factor that is no point estimate.

    A panel is a part of Whisper; colour and shape are the projection, filled is A, hollow is B.
    """
    rows = [(LayerPosition.of(row.module), row) for row in summary.factors if row.kl is not None]
    parts = [part for part in PARTS if any(one.part == part for one, _ in rows)]
    middle = np.median([row.contraction for _, row in rows])
    noise = np.median([row.signal_to_noise for _, row in rows])
    title = f"Contraction (median {middle:.2f}) against signal-to-noise (median {noise:.2g})"
    figure, axes = new_figure(title, 3.4, 1, len(parts), sharex=True, sharey=True)
    for panel, part in zip(axes[0], parts, strict=True):
        for position, row in rows:
            if position.part != part:
                continue
            color, marker = MARKERS.get(position.projection, (BLACK, "*"))
            panel.plot(
                *(max(row.signal_to_noise, 1e-4), row.contraction),
                marker=marker,
                color=color,
                markerfacecolor=color if row.factor == "A" else "none",
                markersize=5 if len(rows) < CROWD else 3,
                linestyle="none",
            )
        panel.set_xscale("log")
        panel.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        label_axes(panel, PARTS[part])
        panel.grid(alpha=0.25, linewidth=0.5)
    low = min(row.contraction for _, row in rows)
    axes[0][0].set_ylim(min(low - 0.05, 0.9), 1.0)  # so that equal looks equal
    axes[0][0].set_ylabel("contraction, 1 - Var q / Var p", fontsize=TEXT)
    label = "signal-to-noise: median |mean| / sd of a factor"
    axes[0][len(parts) // 2].set_xlabel(label, fontsize=TEXT)
    used = {position.projection for position, _ in rows}
    looks = [(name, *MARKERS[name], MARKERS[name][0]) for name in PROJECTIONS if name in used]
    looks += [("filled: A", BLACK, "o", BLACK), ("hollow: B", BLACK, "o", "none")]
    handles = [
        Line2D([], [], label=label, color=color, marker=marker, markerfacecolor=face, linestyle="")
        for label, color, marker, face in looks
    ]
    spacing = {"handletextpad": 0.1, "columnspacing": 1.0}
    figure.legend(handles=handles, ncols=8, **LEGEND_BELOW, **spacing)
    return figure


def density_plot(found: Sequence[Densities]) -> Figure:
    """Plot densities of a weight under prior and posterior, and of the means, logarithmic.

    A panel is one factor of one layer, all its weights together.
    """
    columns = 2 if len(found) > 1 else 1
    rows = -(-len(found) // columns)
    title = "Prior and posterior of a weight, over all weights of a factor (logarithmic)"
    figure, axes = new_figure(title, 0.9 + 2.3 * rows, rows, columns)
    shade = {"color": SKY, "alpha": 0.45, "linewidth": 0, "fill": True}
    for panel, one in zip(axes.flat, found, strict=False):
        panel.stairs(one.means, one.edges, label="posterior means", **shade)
        centers = (one.edges[1:] + one.edges[:-1]) / 2
        panel.plot(centers, one.prior, "--", color=BLACK, linewidth=1.3, label="prior")
        if one.posterior is not None:
            drawn = np.where(one.posterior > 0, one.posterior, np.nan)
            panel.plot(centers, drawn, color=VERMILLION, linewidth=1.5, label="posterior (draws)")
        panel.set_yscale("log")
        values = [v[v > 0] for v in (one.means, one.prior, one.posterior) if v is not None]
        panel.set_ylim(min(v.min() for v in values) / 2, max(v.max() for v in values) * 2)
        panel.set_xlim(one.edges[0], one.edges[-1])
        panel.xaxis.set_major_locator(MaxNLocator(6))
        label_axes(panel, one.title, "weight", "density")
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, **LEGEND_BELOW)
    return figure


def singular_value_plot(summary: Summary) -> Figure:
    """Plot singular values of ΔW with 95% intervals, for the layers with the largest ΔW."""
    top = sorted(summary.updates, key=lambda row: -row.norm)[:TOP_LAYERS]
    columns = min(3, len(top))
    rows = -(-len(top) // columns)
    title = "Directions of ΔW: singular values"
    if any(any(row.singular_stddevs) for row in top):
        title += " ± 1.96 sd; filled where above their sd (dashed)"
    figure, axes = new_figure(title, 0.7 + 2.2 * rows, rows, columns)
    for panel, row in zip(axes.flat, top, strict=False):
        _spectrum(panel, row)
    for panel in axes.flat[len(top) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("singular value", fontsize=TEXT)
    for panel in axes[-1]:
        panel.set_xlabel("direction", fontsize=TEXT)
    return figure


def _spectrum(panel: Any, row: UpdateSummary) -> None:
    values, stddevs = np.array(row.singular_values), np.array(row.singular_stddevs)
    index = np.arange(1, len(values) + 1)
    above = values > stddevs
    if stddevs.any():
        bars = {"fmt": "none", "ecolor": BLUE, "elinewidth": 1.1, "capsize": 1.5}
        panel.errorbar(index, values, yerr=1.96 * stddevs, **bars)
        panel.plot(index, stddevs, color=VERMILLION, linestyle="--", linewidth=1.2, label="sd")
    face = np.where(above, BLUE, "white")
    panel.scatter(index, values, s=16, c=face, edgecolors=BLUE, linewidths=1, zorder=3)
    panel.set_yscale("log")
    shown = np.concatenate([values, stddevs])
    panel.set_ylim(shown[shown > 0].min(initial=values.max() or 1) / 2, None)
    if np.ptp(np.log10(panel.get_ylim())) < 2:
        tick_at_1_2_5(panel.yaxis)
    panel.yaxis.set_minor_formatter(NullFormatter())
    count = f": {row.directions} of {len(values)}" if stddevs.any() else ""
    label_axes(panel, LayerPosition.of(row.module).label + count)
    panel.set_xlim(0.3, len(values) + 0.7)


def trace_plot(history: Sequence[Step], beta: float) -> Figure:
    """Plot NLL and beta · KL by step, and their running means; NLL alone where beta is 0."""
    steps, parts = np.array([step.step for step in history]), loss_parts(history, beta)
    ends = " and ".join(
        f"{running_mean(v)[-1]:.3g} ({n.partition(',')[0]})" for n, v in parts.items()
    )
    figure, axes = new_figure(f"The fit: loss ends at {ends}", 3, 1, len(parts))
    for panel, (name, values) in zip(axes[0], parts.items(), strict=True):
        panel.plot(steps, values, color=SKY, linewidth=0.7, label="step")
        panel.plot(steps, running_mean(values), color=BLACK, linewidth=1.5, label="running mean")
        label_axes(panel, "", "step of SVI", name)
        panel.grid(alpha=0.25, linewidth=0.5)
    axes[0][0].legend(fontsize=SMALL, frameon=False)
    return figure


def loss_parts(history: Sequence[Step], beta: float) -> dict[str, np.ndarray]:
    """Return NLL and beta · KL of every step, (steps,), by name; NLL alone where beta is 0."""
    parts = {"NLL, nats a token": np.array([step.nll for step in history])}
    if beta and all(step.kl is not None for step in history):
        kl = np.array([float(step.kl or 0) for step in history])
        parts[f"{beta:.2g} · KL, nats a token"] = beta * kl
    return parts


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window around each step, cut off at the ends."""
    half = max(1, round(SMOOTHING * len(values) / 2))
    window, middle = np.ones(2 * half + 1), slice(half, half + len(values))
    counts = np.convolve(np.ones(len(values)), window)[middle]
    return np.convolve(values, window)[middle] / counts


def all_plots(
    posterior: Posterior, summary: Summary, history: Sequence[Step], beta: float
) -> dict[str, Figure]:
    """Return every plot of a posterior, by name; that of the fit if its `history` is known."""
    figures = {}
    if any(row.kl is not None for row in summary.factors):
        figures["contraction"] = contraction_plot(summary)
        figures["kl"] = kl_map(summary)
    figures["updates"] = update_map(summary)
    figures["densities"] = density_plot(densities(posterior, summary))
    figures["singular_values"] = singular_value_plot(summary)
    if history:
        figures["trace"] = trace_plot(history, beta)
    if shrinkage := shrinkage_by_layer(posterior):
        figures["active_ranks"] = active_rank_plot(summary, shrinkage)
    return figures


def save_plots(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures as PNG (200 dpi) and as PDF, over files of the same names."""
    paths = []
    for name, figure in figures.items():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is done: not again for every file
        for suffix, about in ((".png", {}), (".pdf", {"CreationDate": None})):
            paths.append(folder / f"{name}{suffix}")
            figure.savefig(paths[-1], dpi=200, metadata=about)
    return paths


def shrinkage_by_layer(posterior: Posterior) -> dict[str, np.ndarray]:
    """Return `A {layer}`, `B {layer}` -> shrinkage factors (rank,), of guides that have them."""
    found = shrinkage_of(posterior.guide)
    return {
        f"{site.factor} {module}": found[site.name][i].cpu().numpy()
        for group in posterior.groups
        for site in group.sites
        if site.name in found
        for i, module in enumerate(site.modules)
    }
