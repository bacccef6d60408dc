"""What is compared: every method with its knob, and the settings, as data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blora_pyro.errors import UserError

# Knobs that are no options of a fit. Afterwards ΔW is multiplied by the factor, and a share of the
# elements of A and B, the sparsity, is set to zero, see `prune`; the share of the draws is divided
# among the train splits of the backward sets (experience replay).
FACTOR, SPARSITY, SHARE = "factor", "sparsity", "share"
BASE, LORA = "base", "lora"  # what all others are held against
PROGRAM, FULL, PEFT = "program", "full", "peft"  # how a fit is made

BETAS = (1e-6, 1e-5, 3e-5, 1e-4)
WIDE_BETAS = (1e-7, 3e-7, *BETAS)
RATES = (3e-4, 1e-3, 2e-3, 5e-3)
FACTORS = (0.3, 0.5, 0.7, 0.85)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
SHARES = (0.1, 0.2, 0.35, 0.5)
DISTILLATIONS = (0.05, 0.2, 1.0)

POINT = {"guide": "point", "beta": 0.0}  # the program as plain LoRA
BAYES = {"lr": 5e-3}


@dataclass(frozen=True)
class Method:
    """A way to adapt the base, with one knob.

    Attributes:
        name: As on the command line.
        title: As in the tables.
        family: Methods of one family share a hue in the picture: `base`, `full`, `lora`,
            `regularised`, `bayes`, `priors` or `both`.
        knob: An option of `FitConfig`, `FACTOR`, `SPARSITY` or `SHARE`; None where there is nothing
            to turn.
        values: Of the knob, rising.
        options: Further options of `FitConfig`.
        of: The method whose chosen value is the fixed part of this one; None stands alone.
        kind: `program` for our Pyro program, `full` for full fine-tuning, `peft` for stock PEFT.
    """

    name: str
    title: str
    family: str
    knob: str | None = None
    values: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None
    kind: str = PROGRAM

    @property
    def choices(self) -> tuple[float | None, ...]:
        """The values, or a single None where there is no knob."""
        return self.values or (None,)


def _bayes(
    name: str,
    title: str,
    family: str = "priors",
    betas: tuple[float, ...] = BETAS,
    **options: Any,
) -> Method:
    return Method(name, title, family, "beta", betas, {**BAYES, **options})


METHODS = {
    method.name: method
    for method in (
        Method(BASE, "base model", "base"),
        Method(
            "full", "full fine-tuning", "full", "lr", (3e-5, 1e-4, 3e-4, 1e-3), POINT, kind=FULL
        ),
        Method(LORA, "LoRA", "lora", "lr", RATES, POINT),
        Method("peft-lora", "LoRA (stock PEFT)", "lora", "lr", RATES, POINT, kind=PEFT),
        Method("scaled-lora", "LoRA, ΔW scaled", "lora", FACTOR, FACTORS, of=LORA),
        Method("pruned-lora", "LoRA, pruned", "lora", SPARSITY, SPARSITIES, of=LORA),
        Method(
            "averaged-lora", "LoRA, averaged", "lora", "average_from", (0.0, 0.25, 0.5), of=LORA
        ),
        Method(
            "map",
            "LoRA, L2 to zero (MAP)",
            "regularised",
            "beta",
            WIDE_BETAS,
            {"prior": "normal", "prior_scale": 0.05},
            of=LORA,
        ),
        Method("ewc-lora", "LoRA, EWC", "regularised", "ewc", (10.0, 100.0, 1e3, 1e4), of=LORA),
        Method("replay-lora", "LoRA, replay", "regularised", SHARE, SHARES, of=LORA),
        Method(
            "distilled-lora",
            "LoRA, distilled",
            "regularised",
            "distillation",
            (0.02, *DISTILLATIONS),
            of=LORA,
        ),
        Method(
            "distilled-lora-pruned",
            "LoRA, distilled, pruned",
            "regularised",
            SPARSITY,
            SPARSITIES,
            of="distilled-lora",
        ),
        _bayes("blora", "BLoRA", "bayes", prior="normal", prior_scale=0.05),
        _bayes(
            "blora-gentle",
            "BLoRA, lr 2e-3",
            "bayes",
            (3e-7, 1e-6, 3e-6, 1e-5),
            lr=2e-3,
            prior="normal",
            prior_scale=0.05,
        ),
        Method(
            "blora-scale",
            "BLoRA, prior scale",
            "bayes",
            "prior_scale",
            (0.01, 0.02, 0.05, 0.1, 0.2),
            of="blora",
        ),
        _bayes("a-only", "BLoRA, A only", prior="a-only"),
        _bayes("laplace", "BLoRA, Laplace", prior="laplace"),
        _bayes("horseshoe", "BLoRA, horseshoe", betas=WIDE_BETAS, prior="horseshoe"),
        _bayes("learned-scale", "BLoRA, learned scale", prior="learned-scale"),
        _bayes("pretrained-scale", "BLoRA, pretrained scale", prior="pretrained-scale"),
        Method("scaled-blora", "BLoRA, ΔW scaled", "both", FACTOR, FACTORS, of="blora"),
        Method(
            "scaled-horseshoe",
            "BLoRA, horseshoe, ΔW scaled",
            "both",
            FACTOR,
            FACTORS,
            of="horseshoe",
        ),
        Method("pruned-blora", "BLoRA, pruned", "both", SPARSITY, SPARSITIES, of="blora"),
        Method("blora-ewc", "BLoRA, EWC", "both", "ewc", (100.0, 1e3, 1e4), of="blora"),
        Method("blora-replay", "BLoRA, replay", "both", SHARE, SHARES, of="blora"),
        Method(
            "blora-distilled",
            "BLoRA, distilled",
            "both",
            "distillation",
            DISTILLATIONS,
            of="blora",
        ),
        Method(
            "horseshoe-replay", "BLoRA, horseshoe, replay", "both", SHARE, SHARES, of="horseshoe"
        ),
        Method(
            "horseshoe-distilled",
            "BLoRA, horseshoe, distilled",
            "both",
            "distillation",
            DISTILLATIONS,
            of="horseshoe",
        ),
        Method(
            "blora-distilled-pruned",
            "BLoRA, distilled, pruned",
            "both",
            SPARSITY,
            SPARSITIES,
            of="blora-distilled",
        ),
    )
}
BAYESIAN = ("bayes", "priors", "both")  # families


@dataclass(frozen=True)
class Setting:
    """How much a fit gets.

    Attributes:
        utterances: Of the new domain; None is all that there are.
        steps: Of the fit.
    """

    utterances: int | None
    steps: int

    @property
    def name(self) -> str:
        """UTTERANCESxSTEPS, such as 150x600 or allx400."""
        return f"{'all' if self.utterances is None else self.utterances}x{self.steps}"

    @property
    def title(self) -> str:
        """In words."""
        amount = "all" if self.utterances is None else f"{self.utterances}"
        return f"{amount} utterances, {self.steps} steps"

    @property
    def options(self) -> dict[str, Any]:
        """Options of `FitConfig`."""
        size = {} if self.utterances is None else {"max_utterances": self.utterances}
        return {**size, "steps": self.steps}


SETTINGS = ("150x600", "400x400")  # few utterances and a long training; more, and a shorter one


def read_setting(text: str) -> Setting:
    """The setting that UTTERANCESxSTEPS names.

    Raises:
        UserError: If it names none.
    """
    match = re.fullmatch(r"(all|[1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(
            f"setting is '{text}'; give UTTERANCESxSTEPS, such as {' or '.join(SETTINGS)}, or "
            "allx400"
        )
    amount, steps = match.groups()
    return Setting(None if amount == "all" else int(amount), int(steps))


def choose_methods(names: Sequence["str | Method"] | None) -> dict[str, Method]:
    """Methods by name, parents before children, and always the base model and LoRA.

    Args:
        names: Of `METHODS`, or methods of one's own; None is all of `METHODS`.

    Raises:
        UserError: If there is no such method.
    """
    given = [*METHODS] if names is None else [BASE, LORA, *names]
    own = {one.name: one for one in given if isinstance(one, Method)}
    chosen: dict[str, Method] = {}

    def add(name: str) -> None:
        method = own.get(name) or find_method(name)
        if method.of is not None and method.of not in chosen:
            add(method.of)
        chosen[name] = method

    for one in given:
        add(one.name if isinstance(one, Method) else one)
    return chosen


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: If there is none.
    """
    if name not in METHODS:
        raise UserError(f"method is '{name}'; give one of {', '.join(METHODS)}")
    return METHODS[name]
