"""Draws of a posterior and its prior, as traces of their Pyro programs and as ArviZ data."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray
from pyro import poutine
from torch import Tensor

from blora_pyro.adapters import Group, Site, match_names
from blora_pyro.errors import UserError
from blora_pyro.guides import latent_sites
from blora_pyro.posterior.inference_data import inference_data

Program = Callable[[], Any]
PRIOR_DRAWS = 64


def traces(program: Program, count: int, seed: int = 0) -> Iterator[poutine.Trace]:
    """`count` traces of a Pyro program, one at a time, the same ones for the same seed.

    Neither the random state nor the parameter store of the caller is touched.
    """
    state = torch.Generator().manual_seed(seed).get_state()
    for _ in range(count):
        with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            trace = poutine.trace(program).get_trace()
            state = torch.get_rng_state()
        yield trace


def log_density(prior: Program, trace: poutine.Trace) -> float:
    """Log p of a draw from a guide, nats; NaN if the guide lacks scales of a hierarchical prior."""
    (scored,) = traces(poutine.replay(prior, trace=trace), 1)
    if latent_sites(scored).keys() != latent_sites(trace).keys():
        return math.nan
    return scored.log_prob_sum().item()


def is_point(trace: poutine.Trace, name: str) -> bool:
    """Whether q of a site is a point mass; `auto-normal` wraps its Normal draws in Deltas too."""
    node = trace.nodes[name]
    return isinstance(node["fn"], dist.Delta) and f"{name}_unconstrained" not in trace.nodes


def point_scales(guide: Program, factors: Collection[str]) -> dict[str, Tensor]:
    """Scales of a hierarchical prior that the guide fits as points, by site name.

    Args:
        guide: A program that samples the factors, and perhaps scales.
        factors: Site names of A and B.
    """
    (trace,) = traces(guide, 1)
    return {
        name: node["value"]
        for name, node in latent_sites(trace).items()
        if name not in factors and is_point(trace, name)
    }


def prior_variances(
    prior: Program, points: Mapping[str, Tensor], factors: Collection[str]
) -> dict[str, Tensor]:
    """Prior variance of every weight by site, of the site's shape.

    The scales of a hierarchical prior are averaged over, and with them the weights of a layer: then
    the shape is (modules, 1, 1).

    Args:
        prior: A program that samples the factors, and perhaps scales.
        points: Values of scales that are held fixed, see `point_scales`.
        factors: Site names of A and B.
    """
    prior = poutine.condition(prior, data=points)
    totals: dict[str, Tensor] = {}
    count = 0
    for trace in traces(prior, PRIOR_DRAWS):
        count += 1
        latent = latent_sites(trace)
        for name in factors:
            variance = latent[name]["fn"].variance
            if is_hierarchical := latent.keys() != set(factors):
                # E[w | scales] = 0, so the law of total variance has one term
                variance = variance.mean((1, 2), keepdim=True)
            totals[name] = totals.get(name, torch.tensor(0.0)) + variance
        if not is_hierarchical:
            break  # nothing to average over
    return {name: total / count for name, total in totals.items()}


@dataclass(frozen=True)
class _Variable:
    """A latent site, or the chosen layers of it.

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
    *,
    draws: int,
    sites: Sequence[str] | None,
    modules: str | None,
    seed: int,
    max_bytes: int,
    attrs: dict[str, str],
) -> Any:
    """See `Posterior.to_arviz`."""
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
    names = _name_dimensions(variables)
    posterior = _empty(variables, names, draws)
    stats = {name: np.empty((1, draws)) for name in ("log_guide", "log_prior")}
    for i, trace in enumerate(traces(guide, draws, seed)):
        with torch.no_grad():
            stats["log_guide"][0, i] = trace.log_prob_sum().item()
            stats["log_prior"][0, i] = log_density(prior, trace)
        for variable in variables:
            posterior[variable.name][0, i] = variable.values(trace)
    drawn = _empty(variables, names, draws)
    for i, trace in enumerate(traces(prior, draws, seed + 1)):  # noise of its own
        for variable in variables:
            drawn[variable.name][0, i] = variable.values(trace)
    sample = {"chain": [0], "draw": np.arange(draws)}
    return inference_data(
        {
            "posterior": xarray.Dataset(posterior, attrs=attrs),
            "prior": xarray.Dataset(drawn, attrs=attrs),
            "sample_stats": xarray.Dataset(
                {name: (("chain", "draw"), values) for name, values in stats.items()}, sample
            ),
        }
    )


def _choose(
    latent: dict[str, Any],
    groups: tuple[Group, ...],
    sites: Sequence[str] | None,
    modules: str | None,
) -> list[_Variable]:
    """The sites and layers asked for.

    Raises:
        UserError: If there is no such site or layer.
    """
    if unknown := [name for name in sites or () if name not in latent]:
        raise UserError(f"there is no site '{unknown[0]}'; give some of: {', '.join(latent)}")
    layers = [name for group in groups for name in group.modules]
    wanted = set(layers if modules is None else match_names(layers, modules))
    if not wanted:
        raise UserError(f"modules '{modules}' match no adapted layer; give some of: {layers}")
    variables = []
    homes = sorted((site for group in groups for site in group.sites), key=lambda s: -len(s.name))
    for name, node in latent.items():
        if sites is not None and name not in sites:
            continue
        site = next((site for site in homes if f"{name}_".startswith(f"{site.name}_")), None)
        coords = _coordinates(name, site, tuple(node["value"].shape))
        shape_key, chosen = "", None
        if site is not None:
            shape_key = site.name.partition("_")[2]
            of_site = [i for i, layer in enumerate(site.modules) if layer in wanted]
            if not of_site:
                continue
            if "module" in coords:
                chosen = of_site
                coords["module"] = tuple(site.modules[i] for i in chosen)
        variables.append(_Variable(name, shape_key, coords, chosen))
    if not variables:
        raise UserError(f"sites {sites} hold no layer that matches '{modules}'; choose others")
    return variables


def _coordinates(
    name: str, site: Site | None, shape: tuple[int, ...]
) -> dict[str, tuple[Any, ...]]:
    """Dimensions of a factor, or of a scale of a hierarchical prior, and their coordinates.

    A user's prior may have scales of other names (then `site` is None) and shapes.
    """
    numbered = {f"{name}_dim_{i}": tuple(range(size)) for i, size in enumerate(shape)}
    if site is None:
        return numbered
    shapes = {
        site.shape: site.dims,
        site.rank_shape: ("module", "rank"),
        site.shape[:1]: ("module",),
    }
    if shape not in shapes:
        return numbered
    return {
        dim: site.modules if dim == "module" else tuple(range(size))
        for dim, size in zip(shapes[shape], shape, strict=True)
    }


def _name_dimensions(variables: list[_Variable]) -> dict[tuple[str, str], str]:
    """(dimension, shape key) -> name: the dimension's own, with the shape behind it on conflict."""
    values: dict[str, set[tuple[Any, ...]]] = {}
    for variable in variables:
        for dim, coordinates in variable.coords.items():
            values.setdefault(dim, set()).add(coordinates)
    return {
        (dim, variable.shape_key): dim if len(values[dim]) == 1 else f"{dim}_{variable.shape_key}"
        for variable in variables
        for dim in variable.coords
    }


def _empty(
    variables: list[_Variable], names: dict[tuple[str, str], str], draws: int
) -> dict[str, xarray.DataArray]:
    """Arrays to be filled, (chain, draw, ...)."""
    arrays = {}
    for variable in variables:
        coords: dict[str, Any] = {"chain": [0], "draw": np.arange(draws)}
        coords |= {
            names[dim, variable.shape_key]: list(values) for dim, values in variable.coords.items()
        }
        shape = [len(values) for values in coords.values()]
        arrays[variable.name] = xarray.DataArray(
            np.zeros(shape, np.float32), coords=coords, dims=list(coords)
        )
    return arrays
