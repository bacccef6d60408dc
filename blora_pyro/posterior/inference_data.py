"""Draws for ArviZ, whichever version is installed: 0.23 (InferenceData) or 1.x (DataTree).

Everything is built from xarray Datasets, so that both versions see the same names, dimensions and
coordinates.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray
from pyro import poutine

from blora_pyro.adapters import Group, Site, match_names
from blora_pyro.data import IGNORED, Examples
from blora_pyro.errors import UserError
from blora_pyro.guides import latent_sites
from blora_pyro.models import Base
from blora_pyro.posterior.draws import (
    Program,
    log_density,
    log_likelihoods,
    token_logits,
    traces,
)

MIN_RATIOS = 30  # gives a tail of six, the smallest that both versions fit


def import_arviz() -> ModuleType:
    """Import ArviZ without the warning by which 0.23 announces 1.x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _is_datatree() -> bool:
    return int(import_arviz().__version__.partition(".")[0]) >= 1


def inference_data(groups: Mapping[str, xarray.Dataset]) -> Any:
    """`arviz.InferenceData` (0.23) or `xarray.DataTree` (1.x) of Datasets by group name."""
    if _is_datatree():
        return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    return import_arviz().InferenceData(**groups)


def pareto_smoothed(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed importance weights, and the fitted shape, k-hat (arXiv 1507.02646).

    K-hat is infinite, and the weights are as they came, where nothing can be fitted: with fewer
    than 30 draws, if the largest ratios are all equal, or if most of them underflow relative to the
    largest.

    Args:
        log_ratios: log p - log q at draws from q, (draws,), up to a constant.

    Returns:
        Logarithms of the weights, (draws,), whose sum is 1; and k-hat.
    """
    ratios = np.array(log_ratios, np.float64)  # a copy, because 0.23 overwrites its argument
    raw, khat = ratios - np.logaddexp.reduce(ratios, initial=-np.inf), math.inf
    weights = raw
    if len(ratios) < MIN_RATIOS:
        return raw, khat
    try:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if _is_datatree():
                from arviz_stats.base import array_stats

                weights, khat = array_stats.psislw(-ratios)  # takes log-likelihoods
            else:
                weights, khat = import_arviz().psislw(ratios)
    except ValueError:  # raised by 1.x if all are equal
        return raw, math.inf
    if not np.isfinite(khat):
        return raw, math.inf
    return np.asarray(weights), float(khat)


def pareto_khat(log_ratios: np.ndarray) -> float:
    """K-hat of ratios, see `pareto_smoothed`."""
    return pareto_smoothed(log_ratios)[1]


@dataclass(frozen=True)
class _Variable:
    """A latent site, restricted to the chosen layers.

    Attributes:
        name: Pyro's site name.
        shape_key: The layers' shape, as in site names.
        coords: Dimension -> coordinate values.
        chosen: Indices of the chosen layers, if the first dimension is over layers.
    """

    name: str
    shape_key: str
    coords: dict[str, tuple[Any, ...]]
    chosen: list[int] | None

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.coords.values())

    def values(self, trace: poutine.Trace) -> np.ndarray:
        value = trace.nodes[self.name]["value"]
        return (value if self.chosen is None else value[self.chosen]).detach().numpy()


def to_inference_data(
    guide: Program,
    prior: Program,
    groups: tuple[Group, ...],
    attrs: dict[str, str],
    draws: int,
    sites: Sequence[str] | None,
    modules: str | None,
    seed: int,
    max_bytes: int,
    predicted: Callable[[], Mapping[str, xarray.Dataset]] = dict,
) -> Any:
    """Draws of guide and prior for ArviZ, and groups `predicted`; see `Posterior.to_arviz`."""
    if draws < 1:
        raise UserError(f"draws is {draws}; give a number above 0")
    (first,) = traces(guide, 1, seed)
    variables = _choose(latent_sites(first), groups, sites, modules)
    size = 2 * 4 * draws * sum(variable.size for variable in variables)
    if size > max_bytes:
        raise UserError(
            f"{draws} draws of posterior and prior would take {size / 2**20:,.0f} MiB, and "
            f"{max_bytes / 2**20:,.0f} MiB are allowed: choose fewer draws=, some sites= or "
            "modules=, or give a larger max_bytes="
        )
    stats = {name: np.empty((1, draws)) for name in ("log_guide", "log_prior")}
    found = {}
    for group, program, its_seed in (("posterior", guide, seed), ("prior", prior, seed + 1)):
        arrays = _empty(variables, draws)
        for i, trace in enumerate(traces(program, draws, its_seed)):
            for variable in variables:
                arrays[variable.name][0, i] = variable.values(trace)
            if group == "posterior":
                with torch.no_grad():
                    stats["log_guide"][0, i] = trace.log_prob_sum().item()
                    stats["log_prior"][0, i] = log_density(prior, trace)
        found[group] = xarray.Dataset(arrays, attrs=attrs)
    found["sample_stats"] = xarray.Dataset(
        {name: (("chain", "draw"), values) for name, values in stats.items()},
        {"chain": [0], "draw": np.arange(draws)},
    )
    return inference_data({**found, **predicted()})


def prediction_groups(
    in_place: Iterable[AbstractContextManager[None]], base: Base, examples: Examples, seed: int
) -> dict[str, xarray.Dataset]:
    """`log_likelihood`, `posterior_predictive` and `observed_data`; see `Posterior.to_arviz`.

    Args:
        in_place: For every draw a context that adapts the base by it.
        base: The model.
        examples: n utterances.
        seed: Of the predicted tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, tokens = [], []
    for context in in_place:
        found, drawn = [], []
        with context:
            for logits, labels in token_logits(base.net, examples):
                found.append(log_likelihoods(logits, labels))
                chances = logits[labels != IGNORED].softmax(-1)  # in the order of the targets
                drawn.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
        scores.append(torch.cat(found).numpy())
        tokens.append(_padded(torch.cat(drawn).numpy(), examples))
    coords = {"chain": [0], "draw": np.arange(len(scores)), "utterance": examples.origins}
    places = ("utterance", "position")
    values = {
        "log_likelihood": (("chain", "draw", "utterance"), np.array([scores])),
        "posterior_predictive": (("chain", "draw", *places), np.array([tokens])),
        "observed_data": (places, _padded(np.concatenate(examples.targets), examples)),
    }
    return {
        name: xarray.Dataset({"tokens": one}, {key: coords[key] for key in coords if key in one[0]})
        for name, one in values.items()
    }


def _padded(tokens: np.ndarray, examples: Examples) -> np.ndarray:
    """Tokens of all targets, one after the other, as (utterances, positions), padded."""
    lengths = np.array([len(one) for one in examples.targets])
    padded = np.full((len(lengths), lengths.max()), IGNORED, np.int32)
    padded[np.arange(lengths.max()) < lengths[:, None]] = tokens
    return padded


def _choose(
    latent: dict[str, Any],
    groups: tuple[Group, ...],
    sites: Sequence[str] | None,
    modules: str | None,
) -> list[_Variable]:
    """The chosen sites and layers; UserError if one is unknown."""
    if unknown := [name for name in sites or () if name not in latent]:
        raise UserError(f"there is no site '{unknown[0]}'; give some of: {', '.join(latent)}")
    layers = [name for group in groups for name in group.modules]
    wanted = set(layers if modules is None else match_names(layers, modules))
    if not wanted:
        raise UserError(f"modules '{modules}' match no adapted layer; give some of: {layers}")
    factors = sorted((one for group in groups for one in group.sites), key=lambda s: -len(s.name))
    variables = []
    for name in latent if sites is None else (name for name in latent if name in sites):
        # A scale's name begins with its factor's; a user's prior may give it another.
        site = next((one for one in factors if f"{name}_".startswith(f"{one.name}_")), None)
        coords = _coordinates(name, site, tuple(latent[name]["value"].shape))
        if site is None:
            variables.append(_Variable(name, "", coords, None))
        elif chosen := [i for i, layer in enumerate(site.modules) if layer in wanted]:
            has_layers = "module" in coords
            if has_layers:
                coords["module"] = tuple(site.modules[i] for i in chosen)
            shape_key = site.name.partition("_")[2]
            variables.append(_Variable(name, shape_key, coords, chosen if has_layers else None))
    if not variables:
        raise UserError(f"sites {sites} hold no layer that matches '{modules}'; choose others")
    return variables


def _coordinates(
    name: str, site: Site | None, shape: tuple[int, ...]
) -> dict[str, tuple[Any, ...]]:
    """Dimensions and coordinates of a factor, or of a scale of a hierarchical prior."""
    shapes = {}
    if site is not None:
        shapes = {
            site.shape: site.dims,
            site.rank_shape: ("module", "rank"),
            site.shape[:1]: ("module",),
        }
    dims = shapes.get(shape, [f"{name}_dim_{i}" for i in range(len(shape))])
    return {
        dim: site.modules if site and dim == "module" else tuple(range(size))
        for dim, size in zip(dims, shape, strict=True)
    }


def _empty(variables: list[_Variable], draws: int) -> dict[str, xarray.DataArray]:
    """Arrays of zeros, (chain, draw, ...), to be filled.

    The name of a dimension along which the variables differ ends in the layers' shape.
    """
    values: dict[str, set[tuple[Any, ...]]] = {}
    for variable in variables:
        for dim, coordinates in variable.coords.items():
            values.setdefault(dim, set()).add(coordinates)
    arrays = {}
    for variable in variables:
        coords: dict[str, Any] = {"chain": [0], "draw": np.arange(draws)}
        for dim, coordinates in variable.coords.items():
            is_one = len(values[dim]) == 1
            coords[dim if is_one else f"{dim}_{variable.shape_key}"] = list(coordinates)
        zeros = np.zeros([len(one) for one in coords.values()], np.float32)
        arrays[variable.name] = xarray.DataArray(zeros, coords=coords, dims=list(coords))
    return arrays
