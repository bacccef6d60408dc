from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from blora_pyro.cli import HOMES, app
from blora_pyro.cli.common import verbosity
from blora_pyro.cli.parameters import parameters, with_options, with_verbosity
from blora_pyro.declarations import option
from blora_pyro.options import Verbosity


@dataclass
class Bread:
    """A group of declared options."""

    PANEL: ClassVar[str] = "Dough"
    flour: str = option("Kind of flour.", "rye")
    minutes: int | None = option("Time.", above=0, panel="Oven")
    steam: bool = option("With steam.", False, panel="Oven")
    seeds: tuple[str, ...] = option("On top.", (), listed="repeated", flag="seed")


@dataclass
class Shop:
    """Another group."""

    PANEL: ClassVar[str] = "Shop"
    shelf: Path | None = option("Where it goes.", unset="the window")


@pytest.fixture
def bake():
    """Runs a command with the options of both groups; returns what it was called with."""
    app, seen = typer.Typer(), []

    @app.command()
    @with_options(Bread, Shop)
    def command(
        dough: dict[str, Any], shop: dict[str, Any], loud: Annotated[bool, typer.Option()] = False
    ) -> None:
        """Bake."""
        seen.append((dough, shop, loud))

    def run(*words):
        result = CliRunner().invoke(app, [*words], env={"TERMINAL_WIDTH": "80", "COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        return seen.pop() if seen else result.stdout

    return run


def test_a_command_gets_what_was_given_of_each_group_as_texts(bake):
    assert bake() == ({}, {}, False)
    words = ["--minutes", "3", "--steam", "--seed", "a", "--seed", "b", "--shelf", "x", "--loud"]
    assert bake(*words) == (
        {"minutes": "3", "steam": True, "seeds": ["a", "b"]},
        {"shelf": "x"},
        True,
    )


def test_the_help_is_that_of_the_declarations_in_their_panels(bake):
    text = " ".join(bake("--help").split())
    for words in ("Dough", "Oven", "Kind of flour. [default: (rye)]", "[default: (the window)]"):
        assert words in text
    assert "--no-steam" not in text and "INTEGER" in text


def test_options_can_be_left_out():
    assert [one.name for one in parameters(Bread, ("steam", "seeds"))] == ["flour", "minutes"]


def test_a_command_runs_with_its_verbosity_and_none_after_it():
    application, seen = typer.Typer(), []

    @application.command()
    @with_verbosity
    def command(loaves: Annotated[int, typer.Option()] = 1) -> None:
        """Bake."""
        seen.append((loaves, verbosity.get()))
        raise typer.Exit(loaves)

    def run(*words):
        result = CliRunner().invoke(application, [*words])
        return result.exit_code, result.stderr

    assert run() == (1, "")
    assert run("--quiet", "--loaves", "3") == (3, "")
    assert run("--verbose") == (1, "")
    assert seen == [
        (1, Verbosity()),
        (3, Verbosity(quiet=True)),
        (1, Verbosity(verbose=True)),
    ]
    assert verbosity.get() == Verbosity()
    code, text = run("--quiet", "--verbose")
    assert code == 2 and text == "blora-pyro: quiet and verbose are given; give one of them\n"
    assert len(seen) == 3


def test_every_command_that_tells_how_far_it_is_can_be_quiet_or_verbose():
    group: Any = typer.main.get_command(app)
    context = group.make_context("blora-pyro", ["fit"], resilient_parsing=True)
    flags = {}
    for name in HOMES:
        command = group.get_command(context, name)
        for sub, one in (getattr(command, "commands", None) or {"": command}).items():
            flags[f"{name} {sub}".strip()] = {flag for each in one.params for flag in each.opts}
    with_both = {name for name, those in flags.items() if {"--quiet", "--verbose"} <= those}
    silent = {"runs", "show", "errors", "combine", "merge", "push-to-hub"}
    assert with_both == flags.keys() - silent
