"""Declared options as parameters of Typer commands."""

import functools
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any

import typer

from blora_pyro.declarations import (
    declarations,
    flag_of,
    help_text,
    is_switch,
    metavar_of,
    shown_default,
)


def parameters(group: type, leave_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Return a keyword parameter for every option of a group.

    The values are texts, lists of them, or switches; what is not given is None, an empty list, or
    False. So the declarations parse and check them, whoever gave them.
    """
    found = []
    for name, declared in declarations(group).items():
        if name in leave_out:
            continue
        kind: Any = str | None
        about: dict[str, Any] = {"help": help_text(group, name), "rich_help_panel": declared.panel}
        if is_switch(group, name):
            kind = bool
        else:
            about |= {
                "metavar": metavar_of(group, name),
                "show_default": shown_default(group, name) or False,
            }
            kind = list[str] | None if declared.listed == "repeated" else kind
        annotation = Annotated[kind, typer.Option(flag_of(group, name), **about)]
        default = False if is_switch(group, name) else None
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    return found


def with_options(*groups: type, leave_out: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Give a command the options of declared groups.

    Its first arguments are then what was given of each group, by name; it has its own parameters
    after them.

    Args:
        groups: Dataclasses of declared options.
        leave_out: Options that the command does not have.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [*inspect.signature(command).parameters.values()][len(groups) :]
        declared = [parameters(group, leave_out) for group in groups]

        @functools.wraps(command)
        def called(**values: Any) -> Any:
            given = []
            for one in declared:
                some = {parameter.name: values.pop(parameter.name) for parameter in one}
                given.append({name: value for name, value in some.items() if value})
            return command(*given, **values)

        every = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        called.__signature__ = inspect.Signature([*chain(*declared), *every])  # type: ignore[attr-defined]
        return called

    return decorate
