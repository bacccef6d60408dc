"""A search for options: what is searched, and what came of it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from blora_pyro.declarations import declarations, is_number, value_types
from blora_pyro.errors import UserError
from blora_pyro.guides import describe_prior, with_prior_arguments
from blora_pyro.metrics.pareto import knee, pareto_front
from blora_pyro.options import MACHINE_OPTIONS, FitConfig, fit_command
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.trials import RUN_FOLDER

Ranges = dict[str, tuple[float, float]]  # name -> lowest and highest value

SEARCH: Ranges = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}
RESULT, PLOT = "sweep.json", "sweep.png"
BACKWARD, FORGETTING = "backward", "forgetting"


@dataclass(frozen=True)
class SearchedFit:
    """A fit of a search, and its errors on the dev sets.

    Attributes:
        number: Of the trial.
        folder: Name of its run folder in that of the search.
        values: By name, of what was searched.
        new_domain: Error as a fraction, `rate`, with its 95% bootstrap `interval`.
        backward: Macro-average over the backward sets, likewise.
        forgetting: Backward error minus that of the base, `difference`, with its paired `interval`.
        sparsity: See `Posterior.sparsity`.
        seconds: Of the fit itself, since it was last begun or resumed.
    """

    number: int
    folder: str
    values: dict[str, float]
    new_domain: dict[str, Any]
    backward: dict[str, Any]
    forgetting: dict[str, Any]
    sparsity: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, trial: FrozenTrial) -> "SearchedFit":
        """Return the fit of a complete trial."""
        names = (NEW_DOMAIN, BACKWARD, FORGETTING, "sparsity", "seconds")
        about = {name: trial.user_attrs[name] for name in names}
        return cls(trial.number, trial.user_attrs[RUN_FOLDER], rounded(trial.params), **about)

    @property
    def errors(self) -> tuple[float, float]:
        """New-domain error and backward error."""
        return self.new_domain["rate"], self.backward["rate"]


@dataclass(frozen=True)
class Search:
    """What is known of a search.

    Attributes:
        output: Its folder.
        study: Name in the database.
        options: Of every fit, as given.
        ranges: What is searched.
        base: The base's errors on the dev sets, `new_domain` and `backward`; None before any trial.
        trials: Those that have ended well, by number.
        diverged: Number, values and failure of the fits whose loss was not finite.
        running: How many trials other processes work on.
    """

    output: Path
    study: str
    options: Mapping[str, Any]
    ranges: Ranges
    base: Mapping[str, Any] | None
    trials: tuple[SearchedFit, ...]
    diverged: tuple[dict[str, Any], ...] = ()
    running: int = 0

    @cached_property
    def front(self) -> list[SearchedFit]:
        """The trials that none beats in both errors, by their new-domain error."""
        return [self.trials[i] for i in pareto_front([one.errors for one in self.trials])]

    @cached_property
    def knee(self) -> SearchedFit | None:
        """The trial at the knee of the front, see `pareto.knee`; None if none has ended."""
        points = [one.errors for one in self.trials]
        base = self.base
        index = knee(points, (base[NEW_DOMAIN]["rate"], base[BACKWARD]["rate"]) if base else None)
        return None if index is None else self.trials[index]

    def command(self, trial: SearchedFit) -> str:
        """Return the `blora-pyro fit` of a trial."""
        return fit_command(FitConfig(**with_values(self.options, trial.values)))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `sweep.json`."""
        best = self.knee
        return {
            "study": self.study,
            "options": agreed_options(dev_config(self.options, self.ranges), self.ranges),
            "base": self.base,
            "front": [one.number for one in self.front],
            "knee": best and {"number": best.number, "command": self.command(best)},
            "trials": [asdict(one) for one in self.trials],
            "diverged": list(self.diverged),
            "running": self.running,
        }


# ---- what is searched


def ranges_of(search: Mapping[str, tuple[float, float]], options: Mapping[str, Any]) -> Ranges:
    """Return what is to be searched, checked against the options of the fits.

    Args:
        search: An option of a fit that is a number, or an argument of the prior -> lowest and
            highest value.
        options: Of `FitConfig`.

    Raises:
        UserError: If a range is none, the prior has no such argument, or a value is given, too.
    """
    prior = options.get("prior", FitConfig.prior)
    arguments = [one.name for one in describe_prior(prior)[1]]
    given = {_one_name(name) for name in (*options, *options.get("prior_args", {}))}
    ranges = {_one_name(name): (float(low), float(high)) for name, (low, high) in search.items()}
    if not ranges:
        raise UserError("nothing is to be searched; name something, such as beta")
    for name, (low, high) in ranges.items():
        key = "scale" if name == "prior_scale" else name
        if key not in arguments and (name == "prior_scale" or not _is_searched_option(name)):
            takes = ", ".join(arguments) or "none"
            raise UserError(
                f"prior {prior} has no '{key}' to be searched; search beta, lr, another option "
                f"that is a number, or an argument of the prior ({takes})"
            )
        if not 0 < low < high < math.inf:
            raise UserError(f"search of {name} is from {low} to {high}; give 0 < low < high")
        if name in given:
            raise UserError(f"{name} is searched and given, too; leave one of them out")
    return ranges


def _is_searched_option(name: str) -> bool:
    return (
        name in declarations(FitConfig)
        and is_number(FitConfig, name)
        and float in value_types(FitConfig, name)
    )


def _one_name(name: str) -> str:
    return "prior_scale" if name == "scale" else name


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that a fit takes: those of the sampler to three digits, to be copied."""
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def with_values(options: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Return options of a fit with searched values; `dev` only where the fit itself needs it."""
    own = {name: value for name, value in values.items() if _is_searched_option(name)}
    arguments = {name: value for name, value in values.items() if name not in own}
    given = {**options, **own}
    if arguments:
        given["prior_args"] = {**options.get("prior_args", {}), **arguments}
    if given.get("eval_every") is None:
        given.pop("dev", None)
    return given


def dev_config(options: Mapping[str, Any], ranges: Ranges) -> FitConfig:
    """Return the configuration by which dev sets are read: a fit at the lowest values.

    Raises:
        UserError: If no fit could be made at the lowest or the highest ones, or there are no
            backward sets.
    """
    lowest, highest = ({name: ends[end] for name, ends in ranges.items()} for end in (0, 1))
    with_prior_arguments(FitConfig(**with_values(options, highest)))
    given = with_values(options, lowest)
    if options.get("dev") is not None and "dev" not in given:
        given |= {"dev": options["dev"], "eval_every": 1}  # a fit takes it with both only
    config = with_prior_arguments(FitConfig(**given))
    if config.pooling is not None:
        raise UserError(
            f"pooling is {config.pooling}, and a sweep looks at the error of one domain; give "
            "pooling complete"
        )
    if not config.backward_sets:
        raise UserError("there are no backward sets to forget; give some as backward")
    return config


def agreed_options(config: FitConfig, ranges: Ranges) -> dict[str, Any]:
    """Return what all processes of one search must agree on, as JSON has it.

    Args:
        config: Of `dev_config`.
        ranges: What is searched.
    """
    content = config.to_json()
    searched = {*ranges, "scale"} if "prior_scale" in ranges else {*ranges}
    content["prior_args"] = {
        name: value for name, value in content["prior_args"].items() if name not in searched
    }
    content = {
        name: value for name, value in content.items() if name not in (*MACHINE_OPTIONS, *ranges)
    }
    return {**content, "search": {name: list(ends) for name, ends in ranges.items()}}
