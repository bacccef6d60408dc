"""The command line: each command is a thin call of one library function."""

import inspect
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from blora_pyro import __version__

HOMES = {
    "fit": "fit",
    **dict.fromkeys(("study", "sweep", "compare"), "study"),
    **dict.fromkeys(("runs", "show", "evaluate", "report", "errors", "diagnose"), "runs"),
    **dict.fromkeys(("keep", "prune", "combine"), "exports"),
    "priors": "runs",
    "transcribe": "transcribe",
    **dict.fromkeys(("merge", "push-to-hub"), "exports"),
    "data": "data",
}  # command -> its module


class Commands(TyperGroup):
    """The commands, each imported and built when it is asked for: a refusal answers at once."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the help."""
        return [*HOMES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name, or None."""
        # Typer looks in `commands` for names like an unknown one.
        for name in [cmd_name] if cmd_name in HOMES else HOMES:
            if name not in self.commands:
                self.add_command(_command(name), name)
        return self.commands.get(cmd_name)


def _command(name: str) -> Any:
    function = getattr(import_module(f"{__name__}.{HOMES[name]}"), name.replace("-", "_"))
    if isinstance(function, typer.Typer):
        group = typer.main.get_command(function)
        group.name = name
        return group
    single = typer.Typer(add_completion=False)
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    # Typer would keep the docstring's line breaks.
    single.command(name, help="\n\n".join(" ".join(one.split()) for one in paragraphs))(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands,
    help="Adapt Whisper to a new domain by variational low-rank adaptation, without losing what it "
    "already knew.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
