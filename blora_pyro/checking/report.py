"""What the terminal shows of data that were looked through."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from blora_pyro.checking.findings import NOTES, REFUSED, DataCheck, SetCheck

EXAMPLES = 3  # of a kind of finding, shown of each set
CHARACTERS = 8


def check_tables(found: DataCheck) -> list[RenderableType]:
    """A table of the sets, one of what a fit would refuse, one of what is worth knowing."""
    lines: list[RenderableType] = [_sets_table(found)]
    tables = (
        _findings_table(found, REFUSED, "a fit would refuse"),
        _findings_table(found, NOTES, "worth knowing; a fit takes it"),
    )
    lines += [table for table in tables if table.row_count]
    rows = {(one.name, row.origin) for one in found.sets for row in one.findings if row.refused}
    if rows:
        left_out = "--on-bad-row skip leaves them out"
        return [*lines, f"a fit would stop at {len(rows):,} bad rows; {left_out}"]
    return [*lines, "a fit would take every row"]


def _sets_table(found: DataCheck) -> Table:
    base = escape(found.base)
    table = _table(f"data for the base {base}, which hears {found.window:g} s at a time")
    for name in ("rows", "hours", "seconds\nmin", "\nmedian", "\nmax"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("Hz", "channels", "languages"):
        table.add_column(name)
    for one in found.sets:
        lengths = [f"{value:.2f}" for value in (one.seconds or {}).values()] or ["–"] * 3
        counts = [_listed(counts) for counts in (one.sampling_rates, one.channels, one.languages)]
        table.add_row(escape(one.name), f"{one.rows:,}", f"{one.hours:.2f}", *lengths, *counts)
    return table


def _listed(counts: Mapping[Any, int]) -> str:
    """Values and how often they come; a value alone needs no number."""
    if len(counts) == 1:
        return escape(f"{next(iter(counts)) or 'none'}")
    return escape(", ".join(f"{value or 'none'}: {count:,}" for value, count in counts.items()))


def _findings_table(found: DataCheck, kinds: Mapping[str, str], title: str) -> Table:
    table = _table(title)
    table.add_column("number", justify="right", no_wrap=True)
    table.add_column("what, and the first of them")
    for one in found.sets:
        for place, (kind, count) in enumerate(one.count(kinds).items()):
            name = escape(one.name) if place == 0 else ""
            table.add_row(name, f"{count:,}", f"[bold]{kinds[kind]}[/bold]")
            for example in _examples(one, kind):
                table.add_row("", "", escape(example))
    return table


def _examples(one: SetCheck, kind: str) -> list[str]:
    rows = [row for row in one.findings if row.kind == kind]
    if kind in ("characters", "bytes"):
        return ["; ".join(row.message for row in rows[:CHARACTERS])]
    return [f"{row.origin}: {row.message}" for row in rows[:EXAMPLES]]


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("set")
    return table
