"""Options declared in the fields of dataclasses, and what is made from the declarations.

A group is a dataclass whose fields are declared with `option`: default, help, allowed values and
panel stand there once. Parsing, checks, names on the command line and the reference in the docs are
made from that. Nothing here knows which options there are.
"""

import difflib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from blora_pyro.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
WIDEST_METAVAR = 16  # so that the help has room for itself in 80 columns


@dataclass(frozen=True)
class Option:
    """The declaration of one option, kept in its field's metadata.

    Attributes:
        help: What it does.
        panel: Heading under which the help and the reference list it; "" is its group's `PANEL`.
        choices: The allowed texts; () takes them from the annotation, which may allow any.
        at_least: Lowest value of a number; None has none.
        above: Bound that a number must exceed; None has none.
        below: Bound that a number must not reach; None has none.
        metavar: What the help shows for its value; None is made from choices and type.
        unset: What None means, in words.
        listed: How the command line takes several values: `repeated`, with `commas`, or not (None).
        flag: Name on the command line, without dashes; None is the field's.
        real: Default with a base other than the pocket Whisper; None is the same.
    """

    help: str
    panel: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    metavar: str | None = None
    unset: str | None = None
    listed: Literal["repeated", "commas"] | None = None
    flag: str | None = None
    real: Any = None


def option(
    help: str,
    default: Any = None,
    *,
    default_factory: Callable[[], Any] | None = None,
    **declared: Any,
) -> Any:
    """Declare a field of a group; `declared` are further attributes of `Option`."""
    metadata = {"option": Option(help, **declared)}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---- what a declaration says


@cache
def declarations(group: type) -> dict[str, Option]:
    """Return the declaration of every option of a group and of those that it inherits, by name."""
    panels = {
        name: one.__dict__.get("PANEL", "")
        for one in reversed(group.__mro__)
        for name in inspect.get_annotations(one)
    }
    found = {one.name: one.metadata["option"] for one in fields(group) if one.metadata}
    return {
        name: replace(declared, panel=declared.panel or panels[name])
        for name, declared in found.items()
    }


_hints = cache(get_type_hints)  # evaluates every annotation of a class


@cache
def value_types(group: type, name: str) -> tuple[Any, ...]:
    """Return the types and literal values that an option's annotation joins, without None."""
    unions = (Union, types.UnionType, Literal)
    parts: list[Any] = [_hints(group)[name]]
    while any(get_origin(one) in unions for one in parts):
        split = [get_args(one) if get_origin(one) in unions else (one,) for one in parts]
        parts = [part for some in split for part in some]
    return tuple(one for one in parts if one is not types.NoneType)


@cache
def choices_of(group: type, name: str) -> tuple[str, ...]:
    """Return the texts that an option may be; () allows any."""
    literals = tuple(one for one in value_types(group, name) if isinstance(one, str))
    return declarations(group)[name].choices or literals


def is_switch(group: type, name: str) -> bool:
    """Return whether an option is either on or off."""
    return value_types(group, name) == (bool,)


def has_two_flags(group: type, name: str) -> bool:
    """Return whether an option is a switch that may be on by default, with a flag for off, too."""
    may_be_on = default_of(group, name) is True or declarations(group)[name].real is not None
    return is_switch(group, name) and may_be_on


def is_number(group: type, name: str) -> bool:
    """Return whether an option may be a number."""
    return bool({int, float} & {*value_types(group, name)})


def default_of(group: type, name: str) -> Any:
    """Return an option's default."""
    (one,) = (one for one in fields(group) if one.name == name)
    return one.default_factory() if one.default_factory is not MISSING else one.default


# ---- on the command line and in the docs


def flag_of(group: type, name: str, value: object = True) -> str:
    """Return the flag of an option, `--name`; `--no-name` where a switch is off."""
    flag = declarations(group)[name].flag or name.replace("_", "-")
    return f"--no-{flag}" if value is False else f"--{flag}"


def metavar_of(group: type, name: str) -> str:
    """Return what the help shows for an option's value; "" for a switch."""
    kinds, names = value_types(group, name), {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    shown = [*choices_of(group, name), *(names[kind] for kind in kinds if kind in names)]
    plain = "" if is_switch(group, name) else "TEXT"
    text = "|".join(shown)
    short = text if len(text) <= WIDEST_METAVAR else "NAME"  # `help_text` lists the choices then
    return declarations(group)[name].metavar or short or plain


def help_text(group: type, name: str) -> str:
    """Return an option's help, with its choices where its metavar has no room for them."""
    text, choices = declarations(group)[name].help, choices_of(group, name)
    if not choices or metavar_of(group, name) != "NAME":
        return text
    return f"{text} One of {alternatives(choices)}."


def shown_default(group: type, name: str) -> str:
    """Return an option's default in words; "" for one that is off, or must be given."""
    default, declared = default_of(group, name), declarations(group)[name]
    is_unset = default is None or default is False or default == {}
    usual = declared.unset or ("" if is_unset else _in_words(default))
    if declared.real is None:
        return usual
    return f"{usual or _in_words(default)} with the pocket, {_in_words(declared.real)} with others"


def _in_words(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def texts_of(group: type, name: str, value: Any) -> Iterator[str | None]:
    """Yield what follows an option on the command line, once for every time that it is given.

    Args:
        group: Of the option.
        name: Its name.
        value: As a group's JSON has it; a switch yields None.
    """
    listed = declarations(group)[name].listed
    if isinstance(value, bool):
        yield None
    elif listed == "commas":
        yield ",".join(map(str, value))
    elif listed == "repeated" and not value:
        yield "none"
    elif isinstance(value, Mapping):
        yield from (key if key == one else f"{key}={one}" for key, one in value.items())
    elif isinstance(value, list | tuple):
        yield from map(str, value)
    else:
        yield str(value)


def reference(groups: Sequence[type]) -> str:
    """Return the options of groups as Markdown: a table for each panel."""
    rows: dict[str, list[str]] = {}
    for group in groups:
        for name, declared in declarations(group).items():
            flags = [flag_of(group, name)]
            flags += [flag_of(group, name, False)] if has_two_flags(group, name) else []
            shown = f"{', '.join(flags)} {metavar_of(group, name)}".strip().replace("|", "\\|")
            cells = [f"`{shown}`", help_text(group, name), shown_default(group, name)]
            rows.setdefault(declared.panel, []).append(
                f"| {' | '.join(cells)} |".replace("  ", " ")
            )
    head = ["| option | what it does | default |", "|---|---|---|"]
    return "\n".join(
        "\n".join([f"## {panel}", "", *head, *lines, ""]) for panel, lines in rows.items()
    )


# ---- one value at a time


def check_names(group: type, names: Iterable[str], where: str) -> None:
    """Refuse names that no option of a group has.

    Args:
        group: Of the options.
        names: To be checked.
        where: They were found, for the message.

    Raises:
        UserError: Naming the first, and the option that may have been meant.
    """
    for name in names:
        if name not in declarations(group):
            raise UserError(
                f"{where} has no option '{name}'{suggestion(name, declarations(group))}"
            )


def known_keywords(
    name: str, more: type | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function refuse a keyword that it does not take, telling what may have been meant.

    Args:
        name: Of the function, in the message.
        more: A group whose options go into another of its arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = [*inspect.signature(function).parameters]

        @wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            for one in keywords:
                if one not in known:
                    hint = suggestion(one, known)
                    if more is not None and one in declarations(more):
                        hint = f"; give {more.__name__}({one}=...)"
                    raise TypeError(f"{name} has no option '{one}'{hint}")
            return function(*args, **keywords)

        return checked

    return decorate


def parse_value(group: type, name: str, value: str | float) -> Any:
    """Return a text as the number that it spells, if the option is one; likewise 3.0 as 3.

    Raises:
        UserError: If it spells none.
    """
    if value in choices_of(group, name) or not is_number(group, name):
        return value
    try:
        number = float(value)
    except ValueError:
        raise refusal(group, name, value) from None
    if int not in value_types(group, name):
        return number
    if not number.is_integer():
        raise refusal(group, name, value)
    return int(number)


def check_kinds(group: type, values: Mapping[str, Any]) -> None:
    """Refuse values that no parser below takes: a number for a text, a text for a list.

    Args:
        group: Of the options.
        values: By name; None passes.

    Raises:
        UserError: Naming the option and the value.
    """
    for name, value in values.items():
        listed, kinds = declarations(group)[name].listed, value_types(group, name)
        if value is None:
            continue
        parts = str | float | int if {Sequence[float], Sequence[int]} & {*kinds} else str
        is_list = isinstance(value, list | tuple) and all(isinstance(one, parts) for one in value)
        if listed == "commas" and not (is_list or isinstance(value, str)):
            raise UserError(f"{name} is {value!r}; give a list, or a text with commas between")
        is_text = listed is None and not choices_of(group, name) and {*kinds} == {str}
        if is_text and not isinstance(value, str | os.PathLike):
            raise UserError(f"{name} is {value!r}; give a text")


def separated(value: str | Sequence[Any]) -> list[Any]:
    """Return the parts of a text with commas between, or of a sequence."""
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else [*value]


def numbers(name: str, value: str | Sequence[Any]) -> tuple[float, ...]:
    """Return numbers, also of a text with commas between.

    Raises:
        UserError: If one of them is none.
    """
    try:
        return tuple(
            one if isinstance(one, int | float) else float(one) for one in separated(value)
        )
    except (TypeError, ValueError):
        raise UserError(f"{name} is '{value}'; give numbers, such as 3,1") from None


def key_values(name: str, value: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Return a mapping, also of texts `key=value`.

    Raises:
        UserError: If a text is none, or a key is given twice.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{name} is {value!r}; give key=value, such as scale=0.05")
    found: dict[str, Any] = {}
    for text in value:
        key, sign, one = (part.strip() for part in text.partition("="))
        if not (key and sign and one):
            raise UserError(f"{name} is '{text}'; give key=value, such as scale=0.05")
        if key in found:
            raise UserError(f"{name} gives '{key}' twice; give it once")
        found[key] = one
    return found


def check_value(group: type, name: str, value: Any) -> None:
    """Refuse a value that the declaration does not allow.

    Raises:
        UserError: Naming the option, the value, and what is allowed.
    """
    declared, choices = declarations(group)[name], choices_of(group, name)
    if value is None:
        if default_of(group, name) is not None:
            raise refusal(group, name, value)
    elif is_switch(group, name):
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; give true or false")
    elif choices and (isinstance(value, str) or not is_number(group, name)):
        if not isinstance(value, str) or value not in choices:
            raise refusal(group, name, value)
    elif is_number(group, name):
        low, above, below = declared.at_least, declared.above, declared.below
        is_possible = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < sys.float_info.max
            and (low is None or value >= low)
            and (above is None or value > above)
            and (below is None or value < below)
        )
        if not is_possible:
            raise refusal(group, name, value)


def refusal(group: type, name: str, value: Any) -> UserError:
    """Return the error that refuses a value: the option, the value, and what is allowed."""
    declared, choices = declarations(group)[name], choices_of(group, name)
    bounds = ("from", declared.at_least), ("above", declared.above), ("below", declared.below)
    allowed = [*choices]
    if is_number(group, name):
        kind = "a whole number" if int in value_types(group, name) else "a number"
        limits = [f"{word} {bound:.12g}" for word, bound in bounds if bound is not None]
        allowed = [" ".join([kind, *limits]), *(f"'{one}'" for one in choices)]
    shown = f"'{value}'" if isinstance(value, str) else value
    return UserError(f"{name} is {shown}; give {alternatives(allowed)}{suggestion(value, choices)}")


def alternatives(allowed: Sequence[str]) -> str:
    """Return texts as "a, b or c"."""
    return (
        " or ".join(filter(None, [", ".join(allowed[:-1]), allowed[-1]])) if allowed else "another"
    )


def suggestion(value: Any, known: Iterable[str]) -> str:
    """Return a question after the known text that a value resembles; "" if it resembles none."""
    close = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f"; did you mean '{close[0]}'?" if close else ""
