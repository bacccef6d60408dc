"""What `fit` and `sweep` were given on the command line, as options of the library."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import typer

from blora_pyro.cli.common import numbers
from blora_pyro.errors import UserError


def fit_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of `FitConfig` by what was parsed of the command line.

    Raises:
        UserError: If a text is not of the form that it should have.
    """
    from blora_pyro.options import FitConfig

    weights, backward = given["data_weights"], given["backward"]
    languages = given["distillation_languages"]
    return {
        **{one.name: given[one.name] for one in fields(FitConfig) if one.name in given},
        "data": tuple(given["data"] or ["de-en"]),
        "data_weights": None if weights is None else numbers("data-weights", weights),
        "backward": _names(backward) if backward else None,
        "beta": _beta(given["beta"]),
        "distillation_languages": None if languages is None else tuple(languages.split(",")),
        "prior_args": _arguments(given["prior_arg"] or [], given["prior_scale"]),
    }


def given_options(context: typer.Context) -> dict[str, Any]:
    """Those of `fit_options` that were on the command line."""
    options = fit_options(context.params)
    return {name: value for name, value in options.items() if _is_given(context, name)}


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option of `FitConfig` was on the command line."""
    source = context.get_parameter_source("prior_arg" if option == "prior_args" else option)
    return source is not None and source.name != "DEFAULT"


def _names(texts: list[str]) -> tuple[str, ...]:
    """Sources but "none", also with commas between; a path with commas stays whole."""
    parts = [[text] if os.path.exists(text) else text.split(",") for text in texts]
    names = [name.strip() for part in parts for name in part]
    return tuple(name for name in names if name != "none")


def _beta(text: str) -> float | str:
    if text in ("auto", "elbo"):
        return text
    try:
        return float(text)
    except ValueError:
        raise UserError(f"beta is '{text}'; give a number >= 0, 'auto' or 'elbo'") from None


def _arguments(texts: list[str], scale: float | None) -> dict[str, str]:
    """`key=value` texts, none given twice or against `--prior-scale`."""
    arguments: dict[str, str] = {}
    for text in texts:
        key, sign, value = (part.strip() for part in text.partition("="))
        if not (key and sign and value):
            raise UserError(f"prior-arg is '{text}'; give key=value, such as scale=0.05")
        if key in arguments:
            raise UserError(f"prior-arg gives '{key}' twice; give it once")
        arguments[key] = value
    if scale is not None and "scale" in arguments:
        raise UserError("scale is given by both --prior-scale and --prior-arg; give it by one")
    return arguments
