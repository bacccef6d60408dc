"""Densities of a weight under prior and posterior, estimated from draws of any prior and guide."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from blora_pyro.adapters import Site
from blora_pyro.diagnostics.explanations import kl_by_module
from blora_pyro.diagnostics.layers import LayerPosition
from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import traces

BINS = 121
PRIOR_VALUES = 2_000_000  # values drawn at least, for the tails
MOST_PRIOR_DRAWS = 500
POSTERIOR_VALUES = 20_000_000  # values drawn, of the whole model


@dataclass(frozen=True)
class Densities:
    """Histograms of all weights of one factor of one layer, as densities.

    Attributes:
        title: Layer and factor.
        edges: Edges of the bins, (bins + 1,).
        prior: Draws of a weight from the prior, its scales averaged over, (bins,).
        posterior: Draws of all weights from q, (bins,); None for a point.
        means: Posterior means, (bins,).
    """

    title: str
    edges: np.ndarray
    prior: np.ndarray
    posterior: np.ndarray | None
    means: np.ndarray


def densities(posterior: Posterior, summary: Summary) -> list[Densities]:
    """Return those of A and B in two layers, of most and least KL a weight (or norm of ΔW)."""
    sizes = {module: kl / weights for module, (kl, weights) in kl_by_module(summary).items()}
    what = "KL a weight" if sizes else "ΔW"
    sizes = sizes or {row.module: row.norm for row in summary.updates}
    most, least = max(sizes, key=lambda n: sizes[n]), min(sizes, key=lambda n: sizes[n])
    chosen = {most: f"most {what}"} | ({least: f"least {what}"} if least != most else {})
    sites: dict[tuple[str, str], Site] = {
        (module, site.factor): site
        for group in posterior.groups
        for site in group.sites
        for module in site.modules
        if module in chosen
    }
    drawn = _posterior_values(posterior, list(sites.items()))
    points = posterior.point_scales()
    found = []
    for module, remark in chosen.items():
        for factor in ("A", "B"):
            key = (module, factor)
            prior = _prior_values(posterior, sites[key], module, points)
            title = f"{factor} of {LayerPosition.of(module).label} ({remark})"
            index = sites[key].modules.index(module)
            means = posterior.mean[sites[key].name][index].cpu().numpy().ravel()
            found.append(_densities(title, prior, drawn.get(key), means))
    return found


def _densities(
    title: str, prior: np.ndarray, drawn: np.ndarray | None, means: np.ndarray
) -> Densities:
    widest = max(np.abs(means).max(), np.quantile(np.abs(prior), 0.999))
    if drawn is not None:
        widest = max(widest, np.quantile(np.abs(drawn), 0.9999))
    edges = np.linspace(-widest, widest, BINS + 1)

    def density(values: np.ndarray) -> np.ndarray:
        counts, _ = np.histogram(values, edges)
        return counts / (len(values) * np.diff(edges))

    return Densities(
        title, edges, density(prior), None if drawn is None else density(drawn), density(means)
    )


def _posterior_values(
    posterior: Posterior, wanted: list[tuple[tuple[str, str], Site]]
) -> dict[tuple[str, str], np.ndarray]:
    """Return draws of all weights of some factors of layers, without those that are points."""
    wanted = [(key, site) for key, site in wanted if bool(posterior.stddev[site.name].any())]
    count = min(64, max(2, POSTERIOR_VALUES // posterior.num_weights))
    values: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key, _ in wanted}
    if wanted:
        for draw in posterior.draws(count):
            for key, site in wanted:
                value = draw[site.name][site.modules.index(key[0])]
                values[key].append(value.detach().cpu().numpy().ravel())
    return {key: np.concatenate(parts) for key, parts in values.items()}


def _prior_values(
    posterior: Posterior, site: Site, module: str, points: dict[str, Tensor]
) -> np.ndarray:
    """Return draws of the prior of one layer; scales that the guide has as points are fixed."""
    index = site.modules.index(module)
    one = replace(
        site,
        modules=(module,),
        shape=(1, *site.shape[1:]),
        weight_stddevs=site.weight_stddevs[index : index + 1],
    )
    own = {name: value for name, value in points.items() if name.startswith(f"{site.name}_")}
    own = {
        name: value[index : index + 1] if value.shape[:1] == site.shape[:1] else value
        for name, value in own.items()
    }

    def program() -> None:
        pyro.sample("weights", posterior.prior.prior(one))

    size = one.shape[1] * one.shape[2]
    count = min(MOST_PRIOR_DRAWS, max(2, PRIOR_VALUES // size))
    return np.concatenate(list(_values(poutine.condition(program, data=own), count)))


def _values(program: "torch.nn.Module", count: int) -> Iterator[np.ndarray]:
    for trace in traces(program, count):
        yield trace.nodes["weights"]["value"].numpy().ravel()
