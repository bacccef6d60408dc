"""Everything that decides a fit, in one place, checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.data import LANGUAGES
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides import prior_arguments
from blora_pyro.models import POCKET, build_estimator, check_device


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit; `run.json` holds it resolved.

    Attributes:
        base: `"pocket"`, a local Whisper checkpoint, or a Hub id.
        data: The new domain: a built-in corpus, a folder with `train.jsonl` (and `test.jsonl`), or
            a manifest, all of it for training.
        test: The new domain's test set, likewise; None is the test split of `data`, if it has one.
        backward: Held-out sets of what the base already knows; None is the six pocket languages
            for the pocket base and none otherwise.
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
    data: str = "de-en"
    test: str | None = None
    backward: tuple[str, ...] | None = None
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
    def backward_sets(self) -> tuple[str, ...]:
        """The backward sets, the default worked out."""
        if self.backward is None:
            return LANGUAGES if self.base == POCKET else ()
        return tuple(self.backward)
