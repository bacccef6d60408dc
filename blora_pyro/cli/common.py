"""What the commands share: options, errors in one line, counts of what goes on, and JSON."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blora_pyro.declarations import help_text, metavar_of
from blora_pyro.errors import (
    Interrupted,
    OtherProcessFailed,
    UserError,
    is_main,
    is_out_of_memory,
    reason,
)
from blora_pyro.options import FitConfig, OutputOptions, Verbosity
from blora_pyro.terminal import escaped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EVERY = 30.0  # seconds between two lines on what goes on, where there is no terminal for a bar
verbosity: ContextVar[Verbosity] = ContextVar("verbosity", default=Verbosity())  # of the command

# no square brackets, which rich takes as markup
RUN_HELP = "Folder of a run, or its id on the Hub: OWNER/NAME or OWNER/NAME@REVISION."
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help=RUN_HELP),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def help_of(name: str, group: type = FitConfig) -> str:
    """Return the help of a declared option, for a command that has an option of its own like it."""
    return help_text(group, name)


Overwrite = Annotated[bool, typer.Option("--overwrite", help=help_of("overwrite", OutputOptions))]
Dtype = Annotated[str, typer.Option(metavar=metavar_of(FitConfig, "dtype"), help=help_of("dtype"))]
Revision = Annotated[
    str | None, typer.Option(help=help_of("revision"), show_default="the main branch")
]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", help=help_of("local_files_only"))
]
Column = Annotated[
    list[str] | None, typer.Option(metavar=metavar_of(FitConfig, "column"), help=help_of("column"))
]
LanguageMap = Annotated[
    list[str] | None,
    typer.Option(metavar=metavar_of(FitConfig, "language_map"), help=help_of("language_map")),
]
Device = Annotated[str, typer.Option(help=help_of("device"))]
STRENGTH_HELP = "Strength of the update: 0 is the base, 1 the fit"
STRENGTH_DEFAULT = "the run's own: 1, or what keeps its contract"
Strength = Annotated[
    float | None, typer.Option(help=f"{STRENGTH_HELP}.", show_default=STRENGTH_DEFAULT)
]
StrengthBy = Annotated[
    str,
    typer.Option(
        metavar="scale|signal-to-noise|base",
        help="How the strength is applied: scale multiplies the update ΔW by it; signal-to-noise "
        "keeps that share of ΔW's squared norm, in the directions that the posterior is surest "
        "of; base, of evaluate alone, takes from ΔW what the frozen base hears in old languages, "
        "and spares what it hears in the new domain.",
    ),
]
Domain = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Use the adapter of this domain, after a fit with --pooling hierarchical or none.",
        show_default="what the domains share",
    ),
]


@contextmanager
def one_line_errors(only_main: bool = False) -> Iterator[None]:
    """Print whatever ends a command early as one line on stderr, never as a traceback.

    Exit codes: 2 for bad input, 1 for a loss that is not finite, 130 for Ctrl-C, 143 for SIGTERM. A
    reader of stdout that is gone ends it without a word.

    Args:
        only_main: Of several processes, which all have the same error, only the main one prints it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by the shell
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        yield
        sys.stdout.flush()  # what can't be written is known here, not at the end of Python
    except BrokenPipeError:
        raise  # Typer ends quietly then
    except OtherProcessFailed:
        raise typer.Exit(2) from None
    except UserError as error:
        if is_main() or not only_main:
            print_error(error)
        raise typer.Exit(2) from None
    except FloatingPointError as error:
        if is_main():  # the loss is that of all
            print_error(f"{error}; try a smaller --lr")
        raise typer.Exit(1) from None
    except Interrupted as error:
        if is_main():
            print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(130) from None
    except RecursionError:
        print_error("something given is nested too deeply; give what blora-pyro wrote")
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print_error("out of memory; what was written before is whole; free some and try again")
        elif isinstance(error, OSError):
            where = f"'{error.filename}'" if error.filename else "standard output"
            why = error.strerror or reason(error)
            print_error(f"{where} can't be read or written ({why}); put that right and try again")
        else:
            raise
        raise typer.Exit(2) from None


def print_error(error: object) -> None:
    """Print an error as one line on stderr."""
    echo(f"blora-pyro: {' '.join(str(error).split())}", err=True)


def echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Print a text that may have others' words in it; every command's plain lines go through it."""
    typer.echo(escaped(text), nl=nl, err=err)


def quiet_libraries() -> None:
    """Keep the loading bars and the advice of transformers out of the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_result(content: Any, as_json: bool, parts: Callable[[], Sequence[Any]]) -> None:
    """Print a result as JSON, or the tables and lines that `parts` makes of it."""
    from blora_pyro.tables import print_report

    if as_json:
        print_json(content)
    else:
        print_report(parts())


def print_json(content: Any) -> None:
    """Print JSON to stdout, indented by two spaces, without escapes of letters."""
    echo(escaped(json.dumps(content, indent=2, ensure_ascii=False), json=True))


class Telling:
    """Lines and bars on stderr of what goes on, as many as the command's `verbosity` asks for.

    Attributes:
        has_bars: Whether bars are shown, and not lines: on a terminal, and without `--verbose`.
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self.verbosity = verbosity.get()
        self.began = time.monotonic()
        self.pace = Pace()
        self.bar: Progress | None = None

    @cached_property
    def console(self) -> "Console":
        """Where it is printed; made when there is something to print, since rich takes time."""
        from blora_pyro.tables import Terminal

        return Terminal(stderr=True, highlight=False)

    @property
    def has_bars(self) -> bool:
        """See the class."""
        if self.verbosity.verbose or not ("console" in vars(self) or sys.stderr.isatty()):
            return False  # without rich
        return self.console.is_terminal

    def say(self, text: str, style: str | None = None, anyway: bool = False) -> None:
        """Print a line; `--quiet` leaves it out, if it need not be told `anyway`."""
        if self.verbosity.quiet and not anyway:
            return
        if self.verbosity.verbose:
            text = f"[{timedelta(seconds=int(time.monotonic() - self.began))}] {text}"
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def count(self, what: str, done: float, total: int, figures: str = "") -> None:
        """Show how much is done: by a bar until it is all, or by a line now and then.

        A float is shown with a tenth, and of one with its percentage.
        """
        if self.verbosity.quiet:
            return
        of_all = f"{done:,} of {total:,}"
        if isinstance(done, float):
            of_all = f"{done:.0%}" if total == 1 else f"{done:,.1f} of {total:,}"
        if not self.has_bars:
            left = self.pace.left(what, done, total)
            if left or self.verbosity.verbose:
                line = f"{what}: {of_all}" + (left and f", {left} left")
                self.say(line + (figures and f"; {figures}"), "dim")
            return
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        if self.bar is None:
            texts = TextColumn("{task.description}"), TextColumn("{task.fields[of_all]}")
            columns = texts[0], BarColumn(bar_width=20), texts[1], TimeRemainingColumn()
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.add_task(escape(what), total=total, of_all=of_all)
            self.bar.start()
        self.bar.update(TaskID(0), completed=done, of_all=of_all)
        if done >= total:
            self.stop()

    def stop(self) -> None:
        """End the bar, if one is shown."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Pace:
    """Says when it is time for another line, and how long what goes on will still take."""

    def __init__(self) -> None:
        """Nothing goes on yet."""
        self.what, self.first = "", 0.0
        self.began = self.told = 0.0

    def left(self, what: str, done: float, total: int) -> str:
        """Return the time left, such as 0:01:30; "" if it is not yet time to tell, or all done."""
        now = time.monotonic()
        if what != self.what or done < self.first:
            self.what, self.first, self.began, self.told = what, done, now, now
        if now - self.told < EVERY or not self.first < done < total:
            return ""
        self.told = now
        seconds = (now - self.began) * (total - done) / (done - self.first)
        return str(timedelta(seconds=round(seconds)))
