"""What the terminal shows of a sweep."""

import shlex
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from blora_pyro.runs.outcomes import NEW_DOMAIN
from blora_pyro.sweeps.studies import JOURNAL
from blora_pyro.sweeps.sweeping import PLOT, Sweep


def sweep_tables(found: Sweep) -> list[RenderableType]:
    """The front with its knee, and the base; what has come to no end; how to fit like the knee."""
    count = len(found.trials)
    counts = [f"{count} trial{'s' if count != 1 else ''} finished"]
    counts += [f"{len(found.diverged)} diverged"] if found.diverged else []
    counts += [f"{found.running} running in other processes"] if found.running else []
    if found.knee is None:
        return ["; ".join(counts)]
    run = shlex.quote(str(found.output / found.knee.folder))
    lines = [
        f"{'; '.join(counts)}; picture: {found.output / PLOT}",
        f"* is the knee of the front; on its test sets: blora-pyro evaluate {run}",
        f"to fit it again: {found.command(found.knee)}",
    ]
    if (journal := found.output / JOURNAL).exists():
        lines.append(f"to look at all trials: optuna-dashboard {shlex.quote(str(journal))}")
    return [_front_table(found), *map(escape, lines)]


def _front_table(found: Sweep) -> Table:
    title = "Pareto front on the dev sets: error in % [95% interval]"
    table = Table(title=title, title_justify="left")
    for name in ("trial", *found.ranges, "new domain", "backward average", "forgetting"):
        table.add_column(name.replace("_", " "), justify="right")
    for one in found.front:
        mark = "*" if one is found.knee else ""
        values = [f"{one.values[name]:.3g}" for name in found.ranges]
        errors = [_cell(one.new_domain), _cell(one.backward)]
        change = _cell(one.forgetting, "difference", "+.1f")
        style = "bold" if mark else None
        table.add_row(f"{mark}{one.number}", *values, *errors, change, style=style)
    if found.base:
        table.add_section()
        errors = [_cell(found.base[name]) for name in (NEW_DOMAIN, "backward")]
        table.add_row("base", *("" for _ in found.ranges), *errors, "")
    return table


def _cell(rate: dict[str, Any], key: str = "rate", form: str = ".1f") -> str:
    low, high = (f"{100 * end:.1f}" for end in rate["interval"])
    return f"{100 * rate[key]:{form}} \\[{low}, {high}]"
