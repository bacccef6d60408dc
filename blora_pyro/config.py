"""Everything that decides a fit, in one place, checked before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.data import (
    LANGUAGES,
    Source,
    as_sources,
    check_weights,
    describe_source,
    named_sources,
)
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides import prior_arguments
from blora_pyro.models import POCKET, build_estimator, check_device


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit; `run.json` holds it resolved.

    Attributes:
        base: `"pocket"`, a local Whisper checkpoint, or a Hub id.
        data: One or more sources of training data, the first of them the new domain; see
            `data.load_split` for what a source may be.
        data_weights: How often each source is drawn from, in proportion; None takes every
            utterance once an epoch.
        test: The new domain's test set; None is the test split of its source, if it has one.
        backward: Held-out sets of what the base already knows: a mapping of names to sources, or
            texts "NAME=SOURCE" or "SOURCE". None is the six pocket languages for the pocket base
            and none otherwise.
        prior: A family of `blora_pyro.guides`, or the path of a file with one.
        guide: None is the family's own; else `point`, `auto-normal`, or a file's path.
        beta: Weight of the KL term; `"auto"` is 1 / (target tokens in the training set).
        prior_scale: The prior's `scale`, before that of `prior_args`; None is the family's default.
        prior_args: Further arguments of the prior family, by name (see `blora-pyro priors`).
        rank: Rank of every update.
        alpha: Updates are scaled by alpha / rank; None is 2 · rank.
        target_modules: As in PEFT: `all-linear`, suffixes with commas between, or a regex.
        lr: Peak learning rate of Adam.
        steps: Steps of SVI.
        epochs: Passes over the training data; takes precedence over `steps`.
        batch_size: Utterances a step.
        estimator: `shared`, `flipout`, `flipout-token` or `local` (see `models.estimators`).
        precision: `fp32`, or `bf16` for Whisper under autocast with float32 factors.
        seed: Of the start, the data order and the noise.
        device: A torch device.
    """

    base: str = POCKET
    data: Source | Sequence[Source] = "de-en"
    data_weights: Sequence[float] | None = None
    test: Source | None = None
    backward: Mapping[str, Source] | Sequence[str] | None = None
    prior: str = "normal"
    guide: str | None = None
    beta: float | Literal["auto"] = 1e-4
    prior_scale: float | None = None
    prior_args: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 16
    alpha: float | None = None
    target_modules: str = ALL_LINEAR
    lr: float = 5e-3
    steps: int = 400
    epochs: float | None = None
    batch_size: int = 16
    estimator: str = "shared"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what can't be fitted.

        Raises:
            UserError: Naming the value, what is allowed and what to do.
        """
        keep = partial(object.__setattr__, self)
        keep("data", self.sources)
        if self.backward is not None:
            keep("backward", named_sources(self.backward))
        if self.data_weights is not None:
            keep("data_weights", tuple(self.data_weights))
        check_weights(self.data_weights, self.sources)
        positive = ("rank", "alpha", "prior_scale", "lr", "steps", "epochs", "batch_size")
        check_positive(**{name: getattr(self, name) for name in positive})
        for name in ("rank", "steps", "batch_size"):
            value = getattr(self, name)
            if value != int(value):
                raise UserError(f"{name} is {value}; give a whole number")
        if self.beta != "auto" and (
            isinstance(self.beta, str) or not (self.beta >= 0 and math.isfinite(self.beta))
        ):
            raise UserError(f"beta is {self.beta!r}; give a number >= 0, or 'auto'")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to 4294967295")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision is '{self.precision}'; give fp32 or bf16")
        build_estimator(self.estimator)
        check_device(self.device)

    def with_prior_args(self) -> "FitConfig":
        """The same with every argument of the prior in `prior_args`, and the guide's name.

        Loads the family: a user's own file is run here.

        Raises:
            UserError: If there is no such family, argument or value.
        """
        given = dict(self.prior_args)
        if self.prior_scale is not None:
            given["scale"] = self.prior_scale
        arguments = prior_arguments(self.prior, **given)
        return replace(self, prior_args=arguments, guide=self.guide or self.prior)

    def resolved(self, num_tokens: int, num_utterances: int) -> "FitConfig":
        """The same with every default worked out, given the size of the training set."""
        steps = self.steps
        if self.epochs is not None:
            steps = max(1, round(self.epochs * math.ceil(num_utterances / self.batch_size)))
        return replace(
            self,
            backward=self.backward_sets,
            beta=1 / num_tokens if self.beta == "auto" else self.beta,
            alpha=self.alpha or 2.0 * self.rank,
            steps=steps,
        )

    @property
    def backward_sets(self) -> dict[str, Source]:
        """The backward sets by name, the default worked out."""
        if self.backward is None:
            return named_sources(LANGUAGES if self.base == POCKET else ())
        return named_sources(self.backward)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of training data."""
        return as_sources(self.data)

    @property
    def new_domain(self) -> Source:
        """What the new domain's test set is read from."""
        return self.sources[0] if self.test is None else self.test

    def to_json(self) -> dict[str, Any]:
        """Attributes by name, as JSON has them; objects of `datasets` are described."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        content["data"] = [describe_source(source) for source in self.sources]
        content["test"] = None if self.test is None else describe_source(self.test)
        if self.backward is not None:
            sets = self.backward_sets.items()
            content["backward"] = {name: describe_source(source) for name, source in sets}
        return content
