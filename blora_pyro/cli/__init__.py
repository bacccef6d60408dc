"""The command line: each command is a thin call of one library function."""

import inspect
from typing import Annotated

import typer

from blora_pyro import __version__
from blora_pyro.cli.data import data
from blora_pyro.cli.fit import fit
from blora_pyro.cli.runs import (
    combine,
    diagnose,
    errors,
    evaluate,
    merge,
    priors,
    prune,
    push_to_hub,
)
from blora_pyro.cli.study import compare, study, sweep
from blora_pyro.cli.transcribe import transcribe

app = typer.Typer(
    help="Adapt Whisper to a new domain by variational low-rank adaptation, without losing what it "
    "already knew.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(fit, study, sweep, compare, evaluate, errors, diagnose, prune, combine, priors),
    *(transcribe, merge, push_to_hub),
)
for command in COMMANDS:
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    # Typer would keep the docstring's line breaks.
    app.command(help="\n\n".join(" ".join(one.split()) for one in paragraphs))(command)
app.add_typer(data, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blora-pyro {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take options that come before a command."""
