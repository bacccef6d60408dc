"""Methods with their knobs, read from TOML, and a method at a value of its knob."""

import reprlib
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from blora_pyro.declarations import check_names, suggestion
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig

BASE, LORA = "base", "lora"  # the base model as it is, and what other methods are compared with
STRENGTH, SPARSITY, SHARE = "strength", "sparsity", "share"
AFTER = (SPARSITY, STRENGTH)  # what is done to a fit afterwards, in this order
FAMILIES = ("base", "full", "lora", "regularised", "bayes", "priors", "both")
SET_BY_THE_STUDY = {"base", "revision", "backward", "data", "data_weights", "seed", "test", "dev"}
BAYESIAN = ("bayes", "priors", "both")

Value = float | str
Shape = Mapping[str, tuple[Any, str]]  # key of a table -> its type, and what to give in words

METHOD: Shape = {
    "title": (str, "a text"),
    "family": (Literal[FAMILIES], f"one of {', '.join(FAMILIES)}"),
    "knob": (str, "the name of an option of a fit, or share, strength or sparsity"),
    "values": (list[float | str], "numbers, or texts, such as [1e-5, 1e-4]"),
    "options": (dict[str, Any], "a table of options of a fit"),
    "of": (str, "the name of a method"),
    "external": (bool, "true or false"),
}


@dataclass(frozen=True)
class Method:
    """A way to adapt the base model, with one knob.

    Attributes:
        name: As on the command line.
        title: As in the tables.
        family: One of `FAMILIES`; those of one family share a hue in the picture.
        knob: An option of `FitConfig`, or `strength`, `sparsity` or `share`; None if there is none.
        values: Of the knob, rising.
        options: Further options of `FitConfig`.
        of: The method whose chosen value this one builds on; None if it builds on none.
        external: Whether another program makes its fits and writes their rows.
    """

    name: str
    title: str = ""
    family: str = "lora"
    knob: str | None = None
    values: tuple[Value, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None
    external: bool = False

    @property
    def choices(self) -> tuple[Value | None, ...]:
        """The values, or a single None where there is no knob."""
        return self.values or (None,)


@dataclass(frozen=True)
class Candidate:
    """A method at one value of its knob.

    Attributes:
        method: The method.
        value: Of its knob; None where there is none.
        parent: The chosen candidate of the method that it builds on.
    """

    method: Method
    value: Value | None = None
    parent: "Candidate | None" = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of its fit and of what is done afterwards, its own before the parent's."""
        parent = self.parent.options if self.parent else {}
        own = {} if self.method.knob is None else {self.method.knob: self.value}
        return {**parent, **self.method.options, **own}

    @property
    def text(self) -> str:
        """METHOD:VALUE, and after it the parent's values, as `--row` takes it."""
        values = [] if self.value is None else [_text(self.value)]
        parent = self.parent.text.partition(":")[2] if self.parent else ""
        return ":".join([self.method.name, *values, *([parent] if parent else [])])

    @property
    def label(self) -> str:
        """The knob and its value, "beta 0.0001", and in parentheses those of the parent."""
        if self.value is None:
            return ""
        own = f"{self.method.knob} {_text(self.value)}"
        return f"{own} ({self.parent.label})" if self.parent and self.parent.label else own

    @property
    def fitted(self) -> "Candidate":
        """The candidate whose fit this one shares: itself, or one that it builds on."""
        only_edits = {*self.method.options, self.method.knob} <= {*AFTER, None}
        return self.parent.fitted if self.parent and only_edits else self


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


# ---- from TOML


def check_table(table: Mapping[str, Any], shape: Shape, where: str) -> None:
    """Refuse a table of TOML with an unknown key, or a value of another type (`UserError`)."""
    for key, value in table.items():
        if key not in shape:
            hint = suggestion(key, shape) or "; see the docs on studies"
            raise UserError(f"{where} has no '{key}'{hint}")
        kind, words = shape[key]
        if not is_of(value, kind):
            raise UserError(f"{where}: {key} is {reprlib.repr(value)}; give {words}")


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value of TOML is of a type, such as `list[str] | dict[str, str]`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(is_of(value, one) for one in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(is_of(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(one, parts[1]) for one in value.values())
    if kind in (int, float):  # a truth value is none, nor is what no float can be
        kinds = int if kind is int else int | float
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and abs(value) < sys.float_info.max
    return kind is Any or isinstance(value, kind)


def read_methods(tables: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Method]:
    """Return the methods of tables, by name; refuse one that can't be (`UserError`)."""
    found = {}
    for name, table in tables.items():
        place = f"{where}, method {name}"
        check_table(table, METHOD, place)
        about = {"title": name, **table, "values": tuple(table.get("values", ()))}
        found[name] = method = Method(name, **about)
        if (method.knob is None) == bool(method.values):
            raise UserError(f"{place} has a knob or values alone; give both, or neither")
        if any(isinstance(one, str) and ":" in one for one in method.values):
            raise UserError(f"{place}: values are {table['values']}; give texts without a colon")
        names = {*method.options, *([] if method.knob is None else [method.knob])}
        check_names(FitConfig, sorted(names - {*AFTER, SHARE}), place)
        if name == BASE and len(names) + len(method.values) > 0:
            raise UserError(
                f"{place} is the base model as it is; give another name to what is fitted"
            )
        if refused := names & SET_BY_THE_STUDY:
            raise UserError(f"{place} sets {min(refused)}, which the study sets; leave it out")
    return found


@cache
def built_in_methods() -> dict[str, Method]:
    """Return the methods of `methods.toml`."""
    path = Path(__file__).with_name("methods.toml")
    return read_methods(tomllib.loads(path.read_text(encoding="utf-8")), path.name)


def choose_methods(
    names: Iterable[str] | None, own: Mapping[str, Method] | None = None
) -> dict[str, Method]:
    """Return methods by name, parents before children, and always the base model.

    Args:
        names: Of the methods; None is all of `own`, and without any all that are built in.
        own: Methods of a study file, which replace built-in ones of the same name.
    """
    known = {**built_in_methods(), **(own or {})}
    chosen: dict[str, Method] = {}

    def add(name: str, children: tuple[str, ...] = ()) -> None:
        method = find_method(name, known)
        if name in children:
            raise UserError(f"method {name} builds on itself; give another 'of'")
        if method.of is not None and method.of not in chosen:
            add(method.of, (*children, name))
        chosen[name] = method

    for name in [BASE, *((own or known) if names is None else names)]:
        add(name)
    return chosen


def find_method(name: str, methods: Mapping[str, Method]) -> Method:
    """Return the method of a name; refuse one that there is not (`UserError`)."""
    if name not in methods:
        listed = ", ".join(methods)
        raise UserError(f"method is '{name}'; give one of {listed}{suggestion(name, methods)}")
    return methods[name]


def read_candidate(text: str, methods: Mapping[str, Method] | None = None) -> Candidate:
    """Return the candidate that METHOD:VALUE names, with its parents' values after its own.

    "scaled-lora:0.5:0.003" is the LoRA of learning rate 0.003 with half its ΔW. None as the methods
    are those that are built in.
    """
    known = built_in_methods() if methods is None else methods
    name, *values = text.split(":")
    chain = [find_method(name, known)]
    while (parent := chain[-1].of) is not None:
        chain.append(find_method(parent, known))
    knobs = [f"{one.knob}".upper() for one in chain if one.knob is not None]
    form = f"row is '{text}'; give {':'.join([name, *knobs])}"
    if len(values) != len(knobs):
        raise UserError(f"{form}, values after the colons")
    candidate: Candidate | None = None
    for method in reversed(chain):
        value: Value | None = None if method.knob is None else values.pop()
        if value is not None and value not in method.values:
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"{form}, numbers after the colons") from None
        candidate = Candidate(method, value, candidate)
    assert candidate is not None
    return candidate
