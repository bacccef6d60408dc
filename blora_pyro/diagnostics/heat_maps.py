"""Heat maps of a posterior, a row a block or a layer: where it adapted, and how many ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from blora_pyro.diagnostics.layers import LayerPosition, layer_grid, layer_kinds
from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.plotting import SMALL, TEXT, TITLE, label_axes, new_figure, tick_at_1_2_5

RANGE = 1000  # ratio of largest to smallest value that a colour scale shows
FLAT = 1e-3  # share of the KL above its floor that is nothing
ROWS = 60  # most layers in a heat map of ranks; more are shown by kind


def kl_map(summary: Summary) -> Figure:
    """Plot KL above its floor by block and projection: of a layer in figures, a weight in colour.

    The floor is what deviations cost that have not moved, see `Summary.kl_floor`.
    """
    totals, floor = summary.kl_by_module(), summary.kl_floor or 0.0
    above = {module: kl - floor * weights for module, (kl, weights) in totals.items()}
    colors = {module: above[module] / weights for module, (_, weights) in totals.items()}
    top = LayerPosition.of(max(colors, key=lambda name: colors[name])).label
    whole, paid = sum(kl for kl, _ in totals.values()), sum(above.values())
    title = (
        f"Where the adaptation went: {_nats(paid)} of {_nats(whole)} nats of KL are above the floor"
        f", most a weight in {top}"
    )
    if paid <= FLAT * whole:
        title = f"Deviations have not moved: all {_nats(whole)} nats of KL are their floor"
    numbers = {module: _nats(kl) for module, kl in above.items()}
    unit = f"KL a weight above {floor:.2g} (numbers: of a layer), nats"
    return _layer_map(colors, numbers, title, unit)


def update_map(summary: Summary) -> Figure:
    """Plot the norm of ΔW by block and projection, relative to the frozen weight if known."""
    relative = all(row.relative_norm is not None for row in summary.updates)
    sizes = {
        row.module: 100 * float(row.relative_norm or 0) if relative else row.norm
        for row in summary.updates
    }
    top = LayerPosition.of(max(sizes, key=lambda name: sizes[name])).label
    least = 10.0 ** np.floor(np.log10(max(max(sizes.values()) / RANGE, 1e-30)))
    numbers = {
        module: f"{size:#.2g}".rstrip(".") if size >= least else f"<{least:g}"
        for module, size in sizes.items()
    }
    unit = "norm of ΔW, % of that of the frozen weight" if relative else "norm of ΔW"
    return _layer_map(sizes, numbers, f"Where the weights moved: most in {top}", unit)


def _nats(kl: float) -> str:
    return f"{kl:,.0f}" if kl < 1e5 else f"{kl / 1e3:,.0f}k"


def _layer_map(values: dict[str, float], numbers: dict[str, str], title: str, unit: str) -> Figure:
    """Plot one value a layer; combinations that do not exist are hatched."""
    blocks, columns, spots = layer_grid(values)
    cells = np.full((len(blocks), len(columns)), np.nan)
    for module, spot in spots.items():
        cells[spot] = values[module]
    figure, axes = new_figure(title, 1.5 + 0.24 * len(blocks))
    panel = axes[0][0]
    image = _heat(panel, cells, blocks)
    panel.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    for module, (row, column) in spots.items():
        color = "black" if image.norm(values[module]) > 0.5 else "white"
        centered = {"ha": "center", "va": "center"}
        panel.text(column, row, numbers[module], fontsize=SMALL, color=color, **centered)
    _add_bar(figure, image, panel, unit)
    return figure


def _add_bar(figure: Figure, image: Any, axes: Any, unit: str) -> None:
    """Add the colour bar below the cells."""
    share = 0.1 / figure.get_figheight()
    position: dict[str, Any] = {"location": "bottom", "fraction": 3 * share, "pad": share}
    bar = figure.colorbar(image, ax=axes, aspect=50, **position)
    bar.set_label(unit, fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    if isinstance(image.norm, LogNorm):
        tick_at_1_2_5(bar.ax.xaxis)


def _heat(panel: Any, cells: np.ndarray, rows: Sequence[str], **limits: float) -> Any:
    """Plot cells in cividis, logarithmic (over three decades) if skewed, on a hatched ground."""
    known = cells[np.isfinite(cells)]
    low, high = (limits.get("low", known.min()), limits.get("high", known.max()))
    low = max(low, high / RANGE) if not limits else low
    skewed = not limits and low > 0 and high > 10 * low
    norm = (
        LogNorm(low, high, clip=True) if skewed else Normalize(low, high if high > low else low + 1)
    )
    panel.patch.set(hatch="////", edgecolor="#bbbbbb", facecolor="white")
    image = panel.imshow(cells, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    label_axes(panel)
    panel.set_yticks(range(len(rows)), rows)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for edge in np.arange(0.5, len(rows) - 1):
        panel.axhline(edge, color="white", linewidth=0.8)
    return image


def active_rank_plot(summary: Summary, shrinkage: dict[str, np.ndarray]) -> Figure:
    """Plot how open each rank of A and B is, 1 - shrinkage factor, the most open first.

    A row is a layer, or the mean of a kind of layer if the layers need more than a page;
    `shrinkage` has the factors (rank,) by `{factor} {module}`.
    """
    positions = {row.module: LayerPosition.of(row.module) for row in summary.updates}
    modules = sorted(positions, key=lambda module: positions[module].order)
    grouped = len(modules) > ROWS
    names = layer_kinds(modules) if grouped else [positions[module].label for module in modules]
    figure, axes = new_figure("", 1.6 + 0.16 * len(names), 1, 2, sharey=True)
    for panel, factor in zip(axes[0], "AB", strict=True):
        cells, counts = np.zeros((2, len(names), summary.rank))
        for module in modules:
            position = positions[module]
            row = names.index(position.kind if grouped else position.label)
            openness = np.sort(1 - shrinkage[f"{factor} {module}"])[::-1]
            cells[row, : len(openness)] += openness
            counts[row, : len(openness)] += 1
        cells = np.where(counts > 0, cells / np.maximum(counts, 1), np.nan)
        image = _heat(panel, cells, names, low=0, high=1)
        active = np.mean([row.active_ranks for row in summary.factors if row.factor == factor])
        title = f"{factor}: {active:.1f} of {summary.rank} ranks active"
        label_axes(panel, title, "rank, most open first")
        panel.set_xticks([0, summary.rank - 1], ["1", str(summary.rank)])
    rows_are = "mean over the layers of a kind" if grouped else "a row a layer"
    title = f"Which ranks are open: 1 - shrinkage factor, {rows_are}"
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    _add_bar(figure, image, axes, "1 - shrinkage factor (1: open, 0: off)")
    return figure
