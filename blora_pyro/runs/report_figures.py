"""Figures of a run's report: what was gained and lost, curves, and the posterior by layer.

They are numbers in percent of their axes; `report.html.jinja` draws them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks
from blora_pyro.diagnostics.layers import LayerPosition, layer_grid, summarise_kinds
from blora_pyro.diagnostics.plots import loss_parts, running_mean
from blora_pyro.diagnostics.report import kinds_table
from blora_pyro.diagnostics.summaries import UpdateSummary, summarise, summarise_updates
from blora_pyro.errors import UserError
from blora_pyro.languages import is_language
from blora_pyro.plotting import Axis
from blora_pyro.posterior import Posterior
from blora_pyro.runs.record import RunRecord
from blora_pyro.runs.scoring import NEW_DOMAIN, OTHER_DATA
from blora_pyro.tables import percent

POINTS = 240  # of a curve
NEAR = 7  # percent of an axis, as far as the name of a mark reaches
_SIGN = re.compile(r"(?<![\w-])-(?=\d)")


def with_minus(text: str) -> str:
    """Return a text whose negative numbers have minus signs, not hyphens."""
    return _SIGN.sub("−", text)


# ---- gained and lost

NEW, OLD = "The new domain", "What the base already knew"


class Row(NamedTuple):
    """A set in the plot of what was gained and lost; figures are fractions.

    Attributes:
        group: `NEW` or `OLD`.
        label: Of the run.
        name: Of the set.
        measure: Its name, in capitals.
        base: Error before.
        adapted: Error after.
        change: Their difference.
        low: Lower end of its interval.
        high: Upper end.
        is_main: It is the set's main measure.
        is_average: It is the average over the backward sets.
        note: What else is to be said of it.
    """

    group: str
    label: str
    name: str
    measure: str
    base: float | None
    adapted: float | None
    change: float | None
    low: float | None
    high: float | None
    is_main: bool = True
    is_average: bool = False
    note: str = ""

    @property
    def kind(self) -> str:
        """`gain` or `harm` if the interval is on one side of 0, else `even`."""
        if self.low is None or self.high is None:
            return "even"
        return "gain" if self.high < 0 else "harm" if self.low > 0 else "even"


def rows_of(label: str, metrics: Mapping[str, Any]) -> list[Row]:
    """Return the sets of `metrics.json`, the new domain's with every measure, and the average."""
    new = {f"domain {name}": both for name, both in metrics.get("domains", {}).items()}
    for key, name in ((NEW_DOMAIN, "new domain"), (OTHER_DATA, "data")):
        new |= {name: metrics[key]} if key in metrics else {}
    rows = []
    for group, sets in ((NEW, new), (OLD, metrics.get("backward", {}))):
        for name, both in sets.items():
            main = both["base"]["metric"]
            for measure in both["change"] if group == NEW else (main,):
                loops = both["adapted"].get("loops", 0)
                note = "drift" if both.get("drift") else f"{loops} loops" if loops else ""
                states = both["base"][measure], both["adapted"][measure], both["change"][measure]
                rows.append(
                    _row(group, label, name, measure.upper(), states, measure == main, note)
                )
    if average := metrics.get("backward_error"):
        states = average["base"], average["adapted"], average["change"]
        rows.append(_row(OLD, label, "average", "", states)._replace(is_average=True))
    return rows


def _row(
    group: str,
    label: str,
    name: str,
    measure: str,
    states: Sequence[Mapping[str, Any]],
    is_main: bool = True,
    note: str = "",
) -> Row:
    base, adapted, change = states
    ends = change["interval"]
    low, high = ends if len(ends) == 2 and None not in ends else (None, None)
    rates = base["rate"], adapted["rate"], change["difference"]
    return Row(group, label, name, measure, *rates, low, high, is_main, note=note)


def forests(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of sets with their axes; of several runs a set's rows stand together.

    `measured` is the content of their `metrics.json`, by the label of the run.
    """
    found = [row for label, metrics in measured.items() for row in rows_of(label, metrics)]
    if len(measured) > 1:
        found = [row for row in found if row.is_main]
    groups = []
    for group in (NEW, OLD):
        rows = [row for row in found if row.group == group]
        names = [row.name for row in rows if not row.is_average]
        order = {name: place for place, name in enumerate(dict.fromkeys([*names, "average"]))}
        rows.sort(key=lambda row: order[row.name])
        if rows:
            ends = [100 * one for row in rows for one in row[6:9] if one is not None]
            groups.append({"title": group, "rows": rows, "axis": Axis.over([0.0, *ends])})
    return groups


class Fragment(NamedTuple):
    """A piece of the headline: text, and what it tells, `gain`, `harm`, `even` or nothing."""

    text: str
    kind: str = ""


def headline(metrics: Mapping[str, Any]) -> list[Fragment]:
    """Return the pieces of the sentence on what was gained and lost."""
    rows = rows_of("", metrics)
    gained = [row for row in rows if row.group == NEW and row.is_main]
    pieces: list[Fragment] = []
    for row in gained:
        figures = f"{percent(row.base)} → {percent(row.adapted)}% {row.measure}"
        pieces += [Fragment(f"; {row.name} "), Fragment(figures, row.kind)]
    old = [row for row in rows if row.group == OLD]
    if average := next((row for row in old if row.is_average), None):
        names = [row.name for row in old if not row.is_average]
        change = with_minus(f"{percent(average.change, '+.1f')} points")
        what = "old languages" if all(map(is_language, names)) else "backward sets"
        pieces += [Fragment(f"; {what} "), Fragment(change, average.kind)]
        if average.kind == "even":
            pieces.append(Fragment(", which may be chance"))
    first, *rest = pieces or [Fragment("nothing was measured")]
    text = first.text.removeprefix("; ")
    return [first._replace(text=text[:1].upper() + text[1:]), *rest]


# ---- curves


class Plot(NamedTuple):
    """A plot that the page draws: title, axes with their labels, paths in percent, and marks."""

    title: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    paths: Sequence[tuple[str, str]]  # a class and a path
    marks: Sequence[Mapping[str, Any]] = ()


def _path(x: Axis, y: Axis, xs: Iterable[float], ys: Iterable[float]) -> str:
    points = [f"{x.at(a):g} {100 - y.at(b):g}" for a, b in zip(xs, ys, strict=True)]
    return f"M{' L'.join(points)}" if points else ""


def loss_plots(record: RunRecord) -> Iterator[Plot]:
    """Yield plots of NLL and beta · KL by step, and of the errors on the dev set."""
    history = [one for one in record.history or () if np.isfinite(one.nll)]
    if len(history) > 1:
        steps = _thinned(np.array([float(one.step) for one in history]))
        x = Axis.over([0.0, *steps.tolist()])
        for name, values in loss_parts(history, float(record.resolved.beta)).items():
            each, smooth = _thinned(values), _thinned(running_mean(values))
            y = Axis.over([*each.tolist(), *smooth.tolist()])
            title = f"{name.partition(',')[0]}: {values[0]:.3g} → {running_mean(values)[-1]:.3g}"
            paths = [("each", _path(x, y, steps, each)), ("mean", _path(x, y, steps, smooth))]
            yield Plot(title, x, y, "step", name, paths)
    dev: Mapping[str, Any] = record.dev or {"errors": ()}
    if len(dev["errors"]) > 1:
        errors = [(one["step"], 100 * one["error"]) for one in dev["errors"]]
        best = dev["best_step"]
        xs, ys = [a for a, _ in errors], [b for _, b in errors]
        x, y = Axis.over([0.0, *xs]), Axis.over(ys)
        marks = [
            {"x": x.at(a), "y": y.at(b), "kind": "chosen" if a == best else "even", "text": ""}
            for a, b in errors
        ]
        title = f"Error on the dev set: {dict(errors)[best]:.1f}% at step {best}, the best"
        paths = [("mean", _path(x, y, xs, ys))]
        yield Plot(title, x, y, "step", "error on the dev set, %", paths, marks)


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return means of at most `POINTS` parts, one after the other."""
    edges = np.linspace(0, len(values), min(len(values), POINTS) + 1).round().astype(int)
    return np.array([values[low:high].mean() for low, high in pairwise(edges)])


def strength_figure(kept: Mapping[str, Any]) -> Plot:
    """Return the plot of new-domain and backward error at every strength; see `strength_plot`."""
    curve = kept["curve"]
    points = [
        one
        for one in curve["points"]
        if None not in (one["new_domain"]["rate"], one["backward_error"]["rate"])
    ]
    xs = [100 * one["new_domain"]["rate"] for one in points]
    ys = [100 * one["backward_error"]["rate"] for one in points]
    spans = [[ys[0] + 100 * (end or 0) for end in one["forgetting"]["interval"]] for one in points]
    x, y = Axis.over(xs), Axis.over([*ys, *(end for span in spans for end in span)])
    marks: list[dict[str, Any]] = [
        {
            "x": x.at(a),
            "y": y.at(b),
            "low": y.at(low),
            "high": y.at(high),
            "kind": "chosen" if one["strength"] == kept["strength"] else "even",
            "text": {0.0: "base", 1.0: "fit"}.get(one["strength"], f"{one['strength']:g}"),
            "below": False,
        }
        for a, b, (low, high), one in zip(xs, ys, spans, points, strict=True)
    ]
    for mark, before in zip(marks[1:], marks, strict=False):  # or their names would overlap
        mark["below"] = not before["below"] and abs(mark["x"] - before["x"]) < NEAR
    return Plot(
        f"Every strength, on {curve['split']}: {kept['strength']:g} is chosen",
        x,
        y,
        f"error on the new domain, {curve['metric'].upper()} in %",
        "backward error, %; bars: 95% of forgetting",
        [("mean", _path(x, y, xs, ys))],
        marks,
    )


# ---- the posterior by layer


def layers(posterior: Posterior, beta: float, has_prior: bool = True) -> dict[str, Any] | None:
    """Return what the posterior says by layer; None if no adapter is shared by the domains.

    Without a prior, as after pruning, there is no KL and nothing to say of how it shrinks.
    """
    if posterior.pooling is not None:
        if not posterior.pooling.is_shared:
            return None
        posterior = posterior.for_domain()
    updates, kl, kinds, words = summarise_updates(posterior), {}, None, ""
    with suppress(UserError):  # of a prior that is not known any more, or code that is not named
        summary = summarise(posterior) if has_prior else None
        if summary is not None:
            kl, kinds = summary.kl_by_module(), kinds_table(summarise_kinds(summary))
            words = how_it_shrinks(summary, Shrinkage.of(posterior, summary), beta)
    blocks, columns, spots = layer_grid(row.module for row in updates)
    is_relative = all(row.relative_norm is not None for row in updates)
    sizes = {row.module: _size_of(row, is_relative) for row in updates}
    most = max(sizes.values()) or 1.0
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for row in updates:
        about = f"{row.directions} of {len(row.singular_values)} directions above their spread"
        if row.module in kl:
            total, weights = kl[row.module]
            about += f"; KL {total / weights:.3f} nats a weight"
        cells[spots[row.module]] = {
            "text": f"{sizes[row.module]:.2g}",
            "share": (sizes[row.module] / most) ** 0.5,
            "about": f"{LayerPosition.of(row.module).label}: {about}",
        }
    unit = "‖ΔW‖ in % of the frozen weight's" if is_relative else "‖ΔW‖"
    grid = {"blocks": blocks, "columns": columns, "cells": cells, "unit": unit}
    return {"grid": grid, "kinds": kinds, "words": words}


def _size_of(row: UpdateSummary, is_relative: bool) -> float:
    return 100 * float(row.relative_norm or 0) if is_relative else row.norm
