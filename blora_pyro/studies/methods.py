"""Methods with their knobs, read from TOML, and a method at a value of its knob."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from blora_pyro.declarations import check_names, suggestion
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.studies.results import BASE

LORA = "lora"  # the reference that other methods are compared with
STRENGTH, SPARSITY, SHARE = "strength", "sparsity", "share"
AFTER = (SPARSITY, STRENGTH)  # what is done to a fit afterwards, in this order
FAMILIES = ("base", "full", "lora", "regularised", "bayes", "priors", "both")
BAYESIAN = ("bayes", "priors", "both")

Value = float | str


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

    @property
    def only_edits(self) -> bool:
        """Whether it shares the fit of the method that it builds on."""
        return self.of is not None and {*self.options, self.knob} <= {*AFTER, None}


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
        return self.parent.fitted if self.parent and self.method.only_edits else self


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


# ---- from TOML


def read_methods(tables: Mapping[str, Any], where: str) -> dict[str, Method]:
    """Return the methods of tables, by name.

    Raises:
        UserError: If one of them can't be, naming it.
    """
    found = {}
    known = [one.name for one in fields(Method) if one.name != "name"]
    for name, table in tables.items():
        place = f"{where}, method {name}"
        if not isinstance(table, Mapping):
            raise UserError(f"{place} is no table; give a knob, values and options")
        for key in table:
            if key not in known:
                raise UserError(f"{place} has no '{key}'{suggestion(key, known)}")
        values = table.get("values", [])
        given = {"title": name, **table, "values": tuple(values) if values else ()}
        method = Method(name, **given)
        _check_method(method, place)
        found[name] = method
    return found


def _check_method(method: Method, where: str) -> None:
    if method.family not in FAMILIES:
        raise UserError(f"{where}: family is '{method.family}'; give one of {', '.join(FAMILIES)}")
    if (method.knob is None) == bool(method.values):
        raise UserError(f"{where} has a knob or values alone; give both, or neither")
    texts = [one for one in method.values if isinstance(one, str)]
    plain = all(isinstance(one, int | float | str) for one in method.values)
    if not plain or any(":" in one for one in texts):
        raise UserError(f"{where}: values are {list(method.values)}; give numbers, or texts")
    names = {*method.options, *([] if method.knob is None else [method.knob])}
    check_names(FitConfig, sorted(names - {*AFTER, SHARE}), where)
    if refused := names & {"data", "data_weights", "backward", "seed", "test", "dev"}:
        raise UserError(f"{where} sets {min(refused)}, which the study sets; leave it out")


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

    Raises:
        UserError: If there is no such method, or it builds on itself.
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
    """Return the method of a name.

    Raises:
        UserError: If there is none.
    """
    if name not in methods:
        listed = ", ".join(methods)
        raise UserError(f"method is '{name}'; give one of {listed}{suggestion(name, methods)}")
    return methods[name]


def read_candidate(text: str, methods: Mapping[str, Method] | None = None) -> Candidate:
    """Return the candidate that METHOD:VALUE names, with its parents' values after its own.

    "scaled-lora:0.5:0.003" is the LoRA of learning rate 0.003 with half its ΔW.

    Args:
        text: The candidate, as of `Candidate.text`.
        methods: By name; None is those that are built in.

    Raises:
        UserError: If it names none.
    """
    known = built_in_methods() if methods is None else methods
    name, *values = text.split(":")
    chain = [find_method(name, known)]
    while (parent := chain[-1].of) is not None:
        chain.append(find_method(parent, known))
    knobs = [one for one in chain if one.knob is not None]
    form = ":".join([name, *(f"{one.knob}".upper() for one in knobs)])
    if len(values) != len(knobs):
        raise UserError(f"row is '{text}'; give {form}, values after the colons")
    left = list(zip(knobs, values, strict=True))
    candidate = None
    for method in reversed(chain):
        given = left.pop()[1] if method.knob is not None else None
        value = _value(method, given, f"row is '{text}'; give {form}")
        candidate = Candidate(method, value, candidate)
    assert candidate is not None
    return candidate


def _value(method: Method, text: str | None, message: str) -> Value | None:
    if text is None or text in method.values:
        return text
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{message}, numbers after the colons") from None
