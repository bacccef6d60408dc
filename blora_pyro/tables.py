"""One table class for terminal, Markdown and HTML, and one way to write rates with intervals.

A report is a sequence of `Table`s and lines of text: `print_report` prints it, `report_markdown`
makes it Markdown, `described_html` what a notebook shows of an object. Text is literal everywhere:
brackets in it are no markup.
"""

import html
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from blora_pyro.terminal import escaped

NONE = "–"  # what is not known, or does not exist
PIPED_WIDTH = 110  # columns of output that goes to no terminal

Emphasis = Literal["", "bold", "dim"]


def number(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash for None."""
    return NONE if value is None else format(value, form)


def percent(share: float | None, form: str = ".1f") -> str:
    """Return a share in percent, without the sign `%`, or a dash for None."""
    text = number(None if share is None else 100 * share, form)
    return re.sub(r"^[-+](0\.?0*)$", "+\\1" if form.startswith("+") else "\\1", text)


@dataclass(frozen=True)
class Percent:
    """A cell: a share shown in percent, `44.7 ±1.2 [39.8, 49.5]`.

    Attributes:
        share: A fraction; None is shown as a dash.
        interval: Its 95% interval, fractions, if there is one.
        stddev: Its standard deviation (over seeds), a fraction, if there is one.
        signed: Show the sign of a positive number, too, as of a difference.
    """

    share: float | None
    interval: Sequence[float | None] | None = None
    stddev: float | None = None
    signed: bool = False

    @classmethod
    def of(cls, rate: Mapping[str, Any]) -> "Percent":
        """Return the cell of `{"rate": ..., "interval": ...}`, or of a `difference`, signed."""
        signed = "difference" in rate
        return cls(rate["difference" if signed else "rate"], rate.get("interval"), signed=signed)

    def __str__(self) -> str:
        """Return the text of the cell."""
        if self.share is None:
            return NONE
        text = percent(self.share, "+.1f" if self.signed else ".1f")
        if self.stddev is not None:
            text += f" ±{percent(self.stddev)}"
        if self.interval is not None:
            text += f" [{', '.join(map(percent, self.interval))}]"
        return text


Cell = str | int | float | Percent | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its head; a line break in it is for the terminal only.
        align: `left` for names and text, `right` for figures.
        wrap: Let cells be broken into lines where the terminal is too narrow.
    """

    title: str
    align: Literal["left", "right"] = "left"
    wrap: bool = True

    @property
    def name(self) -> str:
        """The title on one line."""
        return self.title.replace("-\n", "").replace("\n", " ").strip()


def text_columns(*titles: str, wrap: bool = True) -> list[Column]:
    """Return columns of names or text, aligned to the left."""
    return [Column(title, "left", wrap) for title in titles]


def figure_columns(*titles: str, wrap: bool = False) -> list[Column]:
    """Return columns of figures, aligned to the right."""
    return [Column(title, "right", wrap) for title in titles]


@dataclass
class Table:
    """A table to be filled by `add_row` and `add_section`.

    Attributes:
        columns: From left to right.
        title: Above it.
        captions: Lines below it.
        grid: Draw lines between all cells on a terminal; otherwise below the heads only.
        stack_intervals: On a terminal, put an interval `[low, high]` below its figure.
        rows: (cells, emphasis) each; None is the end of a section.
    """

    columns: Sequence[Column]
    title: str = ""
    captions: Sequence[str] = ()
    grid: bool = False
    stack_intervals: bool = False
    rows: list[tuple[tuple[Cell, ...], Emphasis] | None] = field(default_factory=list)

    def add_row(self, *cells: Cell, emphasis: Emphasis = "") -> None:
        """Add a row of a cell a column; None is shown as a dash.

        Raises:
            ValueError: If there are more or fewer cells than columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append((cells, emphasis))

    def add_section(self) -> None:
        """End a section: on a terminal, a line is drawn before the next row."""
        self.rows.append(None)

    @property
    def filled_rows(self) -> list[tuple[tuple[Cell, ...], Emphasis]]:
        """The rows without the ends of sections."""
        return [row for row in self.rows if row is not None]

    def __rich__(self) -> RenderableType:
        """Return the table as `Console.print` prints it.

        Title and captions are as wide as the terminal: those of rich are as narrow as the table.
        """
        plain: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
        table = RichTable(**({} if self.grid else plain))
        for column in self.columns:
            table.add_column(
                _literal(column.title),
                justify=column.align,
                no_wrap=not column.wrap,
                overflow="fold",  # a name that is cut short is none
            )
        for row in self.rows:
            if row is None:
                table.add_section()
                continue
            texts = [_text(cell) for cell in row[0]]
            if self.stack_intervals:
                texts = [text.replace(" [", "\n[") for text in texts]
            table.add_row(*map(_literal, texts), style=row[1])
        title = [_literal(self.title, "bold")] if self.title else []
        captions = [_literal("\n".join(self.captions), "dim")] if self.captions else []
        end = [Text()] if captions and not self.grid else []  # as below a table without captions
        return Group(*title, table, *captions, *end)

    def to_markdown(self, level: int = 3) -> str:
        """Return the table as GitHub renders it; `level` 0 makes the title a paragraph."""
        names = [_escape_markdown(column.name) for column in self.columns]
        rules = ["---:" if column.align == "right" else "---" for column in self.columns]
        lines = [names, rules, *(_markdown_row(*row) for row in self.filled_rows)]
        parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
        if self.title:
            parts.insert(0, f"{'#' * level} {self.title}" if level else f"{self.title}:")
        return "\n\n".join([*parts, *self.captions])

    def to_html(self) -> str:
        """Return the table as a notebook shows it, everything in it escaped."""
        aligned = [f' style="text-align:{column.align}"' for column in self.columns]
        heads = [
            f"<th{a}>{_html(one.name)}</th>" for a, one in zip(aligned, self.columns, strict=True)
        ]
        lines = [f"<thead><tr>{''.join(heads)}</tr></thead>"]
        for cells, _ in self.filled_rows:
            texts = [
                f"<td{a}>{_html(_text(cell))}</td>" for a, cell in zip(aligned, cells, strict=True)
            ]
            lines.append(f"<tr>{''.join(texts)}</tr>")
        title = [f"<p>{_html(self.title)}</p>"] if self.title else []
        captions = [f"<p>{_html(line)}</p>" for line in self.captions]
        return "\n".join([*title, f"<table>{''.join(lines)}</table>", *captions])


Part = Table | Text | str


class Terminal(Console):
    """A console that escapes what would steer the terminal, in whatever it prints."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of an object, their texts escaped; those of rich's own control not."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(escaped(part.text), part.style)


def print_report(parts: Iterable[RenderableType]) -> None:
    """Print tables and lines to stdout, wide enough for tables also where no terminal is.

    Lines of type `str` are not broken, so that paths and commands can be copied; a `Text` is.
    """
    _print(Terminal(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH), parts)


def _print(console: Console, parts: Iterable[RenderableType]) -> None:
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def report_text(parts: Iterable[RenderableType]) -> str:
    """Return tables and lines as plain text, in a notebook, too."""
    plain: dict[str, Any] = {"color_system": None, "force_terminal": False, "force_jupyter": False}
    console = Terminal(highlight=False, width=PIPED_WIDTH, file=io.StringIO(), **plain)
    with console.capture() as captured:
        _print(console, parts)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def report_markdown(parts: Iterable[Part]) -> str:
    """Return tables and lines as paragraphs of Markdown."""
    return "\n\n".join(
        part.to_markdown(0) if isinstance(part, Table) else str(part).strip() for part in parts
    )


def described(name: str, facts: Mapping[str, object]) -> str:
    """Return the text that an object shows of itself: its class, and a fact a line."""
    width = max(map(len, facts), default=0)
    lines = [f"    {key:{width}}  {value}" for key, value in facts.items()]
    return "\n".join([f"<blora_pyro.{name}>", *lines])


def described_html(
    name: str, facts: Mapping[str, object], sections: Mapping[str, Sequence[Part]]
) -> str:
    """Return what a notebook shows of an object, as ArviZ does it: facts, and sections to open.

    Args:
        name: Its class.
        facts: Shown always.
        sections: Tables and lines by heading; the first is open. Empty ones are left out.
    """
    filled = {heading: parts for heading, parts in sections.items() if parts}
    lines = [
        f"<tr><td>{_html(key)}</td><td>{_html(value)}</td></tr>" for key, value in facts.items()
    ]
    head = f"<strong>blora_pyro.{_html(name)}</strong><table>{''.join(lines)}</table>"
    folded = [
        f"<details{'' if place else ' open'}><summary>{_html(heading)}</summary>"
        f"{report_html(parts)}</details>"
        for place, (heading, parts) in enumerate(filled.items())
    ]
    return "\n".join(['<div class="blora-pyro">', head, *folded, "</div>"])


def report_html(parts: Iterable[Part]) -> str:
    """Return tables and lines as HTML."""
    return "\n".join(
        part.to_html() if isinstance(part, Table) else f"<p>{_html(part)}</p>" for part in parts
    )


def _html(text: object) -> str:
    return html.escape(escaped(str(text)))


def _literal(text: str, style: str = "") -> Text:
    """Return a text that is escaped before its width is measured."""
    return Text(escaped(text), style)


def _text(cell: Cell) -> str:
    return NONE if cell is None else str(cell)


def _markdown_row(cells: Sequence[Cell], emphasis: Emphasis) -> list[str]:
    texts = [_escape_markdown(_text(cell)) for cell in cells]
    return [f"**{text}**" if text and emphasis == "bold" else text for text in texts]


def _escape_markdown(text: str) -> str:
    """Return a cell's text, in which a bar would begin another cell."""
    return " ".join(text.replace("|", "\\|").split())
