"""Declared options as parameters of Typer commands."""

import functools
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import one_line_errors, verbosity
from blora_pyro.declarations import (
    declarations,
    flag_of,
    has_two_flags,
    help_text,
    is_switch,
    metavar_of,
    shown_default,
)
from blora_pyro.options import Verbosity


def parameters(group: type, leave_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Return a keyword parameter for every option of a group.

    The values are texts, lists of them, or switches; what is not given is None or an empty list. So
    the declarations parse and check them, whoever gave them.
    """
    found = []
    for name, declared in declarations(group).items():
        if name in leave_out:
            continue
        kind: Any = list[str] | None if declared.listed == "repeated" else str | None
        about: dict[str, Any] = {
            "help": help_text(group, name),
            "rich_help_panel": declared.panel,
            "show_default": shown_default(group, name) or False,
        }
        flags = flag_of(group, name)
        if is_switch(group, name):
            kind = bool | None
            flags += f"/{flag_of(group, name, False)}" if has_two_flags(group, name) else ""
        else:
            about["metavar"] = metavar_of(group, name)
        annotation = Annotated[kind, typer.Option(flags, **about)]
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    return found


def with_options(
    *groups: type, leave_out: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> Callable[..., Any]:
    """Give a command the options of declared groups.

    Its first arguments are then what was given of each group, by name; it has its own parameters
    after them.

    Args:
        groups: Dataclasses of declared options.
        leave_out: Options that the command does not have.
        only: Those that it has; None is all others.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [*inspect.signature(command).parameters.values()][len(groups) :]
        declared = [
            [one for one in parameters(group, leave_out) if only is None or one.name in only]
            for group in groups
        ]

        @functools.wraps(command)
        def called(**values: Any) -> Any:
            given = []
            for one in declared:
                some = {parameter.name: values.pop(parameter.name) for parameter in one}
                given.append({name: one for name, one in some.items() if one or one is False})
            return command(*given, **values)

        every = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        called.__signature__ = inspect.Signature([*chain(*declared), *every])  # type: ignore[attr-defined]
        return called

    return decorate


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--quiet` and `--verbose`, which are the `verbosity` while it runs."""

    @functools.wraps(command)
    def called(quiet: bool | None = None, verbose: bool | None = None, **values: Any) -> Any:
        with one_line_errors():
            chosen = verbosity.set(Verbosity(quiet=bool(quiet), verbose=bool(verbose)))
        try:
            return command(**values)
        finally:
            verbosity.reset(chosen)

    own = inspect.signature(command).parameters.values()
    signature = inspect.Signature([*own, *parameters(Verbosity)])
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called
