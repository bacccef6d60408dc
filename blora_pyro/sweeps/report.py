"""What the terminal shows of a sweep."""

import shlex

from blora_pyro.runs.outcomes import NEW_DOMAIN
from blora_pyro.sweeps.studies import JOURNAL
from blora_pyro.sweeps.sweeping import PLOT, Sweep
from blora_pyro.tables import Part, Percent, Table, figure_columns


def sweep_tables(found: Sweep) -> list[Part]:
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
    return [_front_table(found), *lines]


def _front_table(found: Sweep) -> Table:
    title = "Pareto front on the dev sets: error in % [95% interval]"
    heads = ("trial", *found.ranges, "new domain", "backward average", "forgetting")
    names = [name.replace("_", " ") for name in heads]
    table = Table(figure_columns(*names, wrap=True), title, grid=True)
    for one in found.front:
        mark = "*" if one is found.knee else ""
        values = [f"{one.values[name]:.3g}" for name in found.ranges]
        errors = map(Percent.of, (one.new_domain, one.backward, one.forgetting))
        table.add_row(f"{mark}{one.number}", *values, *errors, emphasis="bold" if mark else "")
    if found.base:
        table.add_section()
        errors = map(Percent.of, (found.base[NEW_DOMAIN], found.base["backward"]))
        table.add_row("base", *("" for _ in found.ranges), *errors, "")
    return table
