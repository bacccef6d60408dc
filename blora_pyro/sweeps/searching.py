"""What a sweep searches, and the options of its fits."""

import math
from collections.abc import Mapping
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.guides import describe_prior, with_prior_arguments
from blora_pyro.options import FitConfig

Ranges = dict[str, tuple[float, float]]  # name -> lowest and highest value

SEARCH: Ranges = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}
OPTIONS = ("beta", "lr", "prior_scale")  # any other name is an argument of the prior
ANYWHERE = ("device", "local_files_only", "track")  # processes at one sweep may differ in them


def ranges_of(search: Mapping[str, tuple[float, float]], options: Mapping[str, Any]) -> Ranges:
    """What is to be searched, checked against the options of the fits.

    Args:
        search: `beta`, `lr`, `prior_scale` or an argument of the prior -> lowest and highest value.
        options: Attributes of `FitConfig`.

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
        if name not in ("beta", "lr") and key not in arguments:
            takes = ", ".join(arguments) or "none"
            raise UserError(
                f"prior {prior} has no '{key}' to be searched; search beta, lr or an argument of "
                f"the prior ({takes})"
            )
        if not 0 < low < high < math.inf:
            raise UserError(f"search of {name} is from {low} to {high}; give 0 < low < high")
        if name in given:
            raise UserError(f"{name} is searched and given, too; leave one of them out")
    return ranges


def _one_name(name: str) -> str:
    return "prior_scale" if name == "scale" else name


def with_values(options: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Options of a fit, with what is searched in its place; `dev` where the fit itself needs it."""
    given = {**options, **{name: value for name, value in values.items() if name in OPTIONS}}
    arguments = {name: value for name, value in values.items() if name not in OPTIONS}
    if arguments:
        given["prior_args"] = {**options.get("prior_args", {}), **arguments}
    if given.get("eval_every") is None:
        given.pop("dev", None)
    return given


def dev_config(options: Mapping[str, Any], ranges: Ranges) -> FitConfig:
    """The configuration by which dev sets are read: a fit at the lowest values.

    Raises:
        UserError: If no fit could be made at the lowest or the highest ones, or there are no
            backward sets.
    """
    with_prior_arguments(FitConfig(**with_values(options, _ends(ranges, 1))))
    given = with_values(options, _ends(ranges, 0))
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


def _ends(ranges: Ranges, end: int) -> dict[str, float]:
    return {name: ends[end] for name, ends in ranges.items()}


def agreed_options(config: FitConfig, ranges: Ranges) -> dict[str, Any]:
    """What all processes at one sweep must agree on, as JSON has it.

    Args:
        config: Of `dev_config`.
        ranges: What is searched.
    """
    content = config.to_json()
    searched = {*ranges, "scale"} if "prior_scale" in ranges else {*ranges}
    content["prior_args"] = {
        name: value for name, value in content["prior_args"].items() if name not in searched
    }
    left_out = {*ANYWHERE, *ranges}
    content = {name: value for name, value in content.items() if name not in left_out}
    return {**content, "search": {name: list(ends) for name, ends in ranges.items()}}
