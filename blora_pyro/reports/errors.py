"""The errors of a Whisper to be read on a terminal: alignments, word above word."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from blora_pyro.data.messages import printable
from blora_pyro.runs.utterances import worst

FREQUENT = 8  # errors named in the first lines
LABELS = ("REF", "HYP", "")
GAP = "  "

Row = dict[str, Any]
Column = tuple[str, str, str]  # reference above hypothesis above the kind of error


class Alignment:
    """A row's alignment as wide as the terminal, in as many blocks of lines as that takes."""

    def __init__(self, row: Row) -> None:
        """Read it."""
        self.columns = [_column(*step) for step in row["alignment"]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield lines of reference, hypothesis and kinds of errors."""
        room = options.max_width - len(LABELS[0]) - len(GAP)
        for block in _blocks(self.columns, room):
            for index, label in enumerate(LABELS):
                line = Text(f"{label:3}", style="dim", no_wrap=True)
                for column in block:
                    style = "bold red" if column[2] else "default not dim"
                    cell = column[index]
                    pad = " " * (_width(column) - cell_len(cell))
                    line.append(GAP).append(cell, style).append(pad)
                line.rstrip()
                if line.plain.strip():
                    yield line


def error_view(rows: Sequence[Row], top: int) -> list[RenderableType]:
    """The `top` utterances with the most errors among rows of `utterance_rows`, to be read."""
    shown = worst(rows, top)
    if not shown:
        return [f"no errors in {len(rows)} utterances"]
    wrong = sum(row["edits"] > 0 for row in rows)
    lines: list[RenderableType] = [
        f"{rows[0]['state']}: errors in {wrong} of {len(rows)} utterances; the worst {len(shown)}:"
    ]
    for row in shown:
        lines += [Text(), *_title(row), Alignment(row)]
    edits = Counter(
        (step[1] or "(nothing)", step[2] or "(nothing)")
        for row in rows
        for step in row["alignment"]
        if step[0] != "="
    )
    frequent = ", ".join(
        f"{printable(wanted)} → {printable(got)} ({count})"
        for (wanted, got), count in edits.most_common(FREQUENT)
    )
    notes = "S substitution, D deletion, I insertion"
    if any(len(step) > 3 for row in shown for step in row["alignment"]):
        notes += ", * counts in PIER"
    return [*lines, Text(f"\nmost frequent: {frequent}"), Text(notes, style="dim")]


def _title(row: Row) -> list[Text]:
    """How wrong it is, and what to listen to."""
    rate = f"{row['metric'].upper()} {row['edits']} of {row['length']}"
    if pier := row.get("pier"):
        rate += f", PIER {pier['edits']} of {pier['length']}"
    place = printable(row["audio"] or row["origin"])
    start, end = row.get("start"), row.get("end")
    if start is not None or end is not None:
        place += f", {start or 0:g} s to " + ("its end" if end is None else f"{end:g} s")
    return [Text(f"{rate}  {printable(row['set'])}"), Text(place, "dim", overflow="fold")]


def _column(operation: str, reference: str, hypothesis: str, *pier: str) -> Column:
    mark = "" if operation == "=" else operation + ("*" if pier else "")
    return printable(reference), printable(hypothesis), mark


def _width(column: Column) -> int:
    return max(map(cell_len, column))


def _blocks(columns: Sequence[Column], room: int) -> Iterator[list[Column]]:
    """Yield the columns in blocks, each no wider than `room` unless it is one column."""
    block: list[Column] = []
    used = 0
    for column in columns:
        if block and used + _width(column) + len(GAP) > room:
            yield block
            block, used = [], 0
        block.append(column)
        used += _width(column) + len(GAP)
    if block:
        yield block
