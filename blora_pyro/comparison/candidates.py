"""A method at one value of its knob, and how it is named on the command line."""

from dataclasses import dataclass
from typing import Any

from blora_pyro.comparison.methods import Method, find_method
from blora_pyro.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A method at one value of its knob.

    Attributes:
        method: The method.
        value: Of its knob; None where there is none.
        parent: The chosen candidate of the method that it is `of`.
    """

    method: Method
    value: float | None = None
    parent: "Candidate | None" = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of `FitConfig`, and the other knobs, the parent's before its own."""
        parent = self.parent.options if self.parent else {}
        own = {} if self.method.knob is None else {self.method.knob: self.value}
        return {**parent, **self.method.options, **own}

    @property
    def kind(self) -> str:
        """How its fit is made: that of the method which it comes from in the end."""
        return self.parent.kind if self.parent else self.method.kind

    @property
    def text(self) -> str:
        """METHOD:VALUE, and after it the parent's values, as `--row` takes it."""
        values = [] if self.value is None else [f"{self.value:.12g}"]
        parent = self.parent.text.partition(":")[2] if self.parent else ""
        return ":".join([self.method.name, *values, *([parent] if parent else [])])

    @property
    def label(self) -> str:
        """The knob and its value, "beta 0.0001", and in brackets those of the parent."""
        if self.value is None:
            return ""
        own = f"{self.method.knob} {self.value:g}"
        return f"{own} ({self.parent.label})" if self.parent and self.parent.label else own


def read_candidate(text: str) -> Candidate:
    """The candidate that METHOD:VALUE names; a derived one has its parents' values after its own.

    "scaled-lora:0.5:0.003" is the LoRA of learning rate 0.003 with half its ΔW.

    Raises:
        UserError: If it names none.
    """
    name, *values = text.split(":")
    method = find_method(name)
    chain = [method]
    while chain[-1].of is not None:
        chain.append(find_method(chain[-1].of))
    knobs = [one for one in chain if one.knob is not None]
    form = ":".join([name, *(f"{one.knob}".upper() for one in knobs)])
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if len(numbers) != len(knobs) or len(values) != len(knobs):
        raise UserError(f"row is '{text}'; give {form}, numbers after the colons")
    candidate = None
    for one, number in zip(reversed(chain), reversed(numbers or [0.0]), strict=True):
        candidate = Candidate(one, number if one.knob else None, candidate)
    assert candidate is not None
    return candidate
