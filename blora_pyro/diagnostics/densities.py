"""Densities of a weight under prior and posterior, estimated from draws of any prior and guide."""

from dataclasses import dataclass, replace

import numpy as np
import pyro
from pyro import poutine
from torch import Tensor

from blora_pyro.adapters import Site
from blora_pyro.diagnostics.layers import LayerPosition
from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import traces

BINS = 121
PRIOR_VALUES = 2_000_000  # values drawn at least, for the tails
MOST_PRIOR_DRAWS = 500
POSTERIOR_VALUES = 20_000_000  # values drawn, of the whole model

_Layers = dict[tuple[str, str], tuple[Site, int]]  # (module, factor) -> its place in a site


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
    what = "KL a weight"
    sizes = {module: kl / weights for module, (kl, weights) in summary.kl_by_module().items()}
    if not sizes:
        what, sizes = "ΔW", {row.module: row.norm for row in summary.updates}
    most, least = max(sizes, key=lambda n: sizes[n]), min(sizes, key=lambda n: sizes[n])
    remarks = {least: f"least {what}", most: f"most {what}"}
    layers: _Layers = {
        (module, factor): (site, site.modules.index(module))
        for module in dict.fromkeys((most, least))
        for factor in ("A", "B")
        for group in posterior.groups
        for site in group.sites
        if site.factor == factor and module in site.modules
    }
    drawn = _posterior_values(posterior, layers)
    points = posterior.point_scales()
    found = []
    for (module, factor), (site, index) in layers.items():
        prior = _prior_values(posterior, site, index, points)
        title = f"{factor} of {LayerPosition.of(module).label} ({remarks[module]})"
        means = posterior.mean[site.name][index].cpu().numpy().ravel()
        found.append(_histograms(title, prior, drawn.get((module, factor)), means))
    return found


def _histograms(
    title: str, prior: np.ndarray, drawn: np.ndarray | None, means: np.ndarray
) -> Densities:
    widest = max(np.abs(means).max(), np.quantile(np.abs(prior), 0.999))
    if drawn is not None:
        widest = max(widest, np.quantile(np.abs(drawn), 0.9999))
    edges = np.linspace(-widest, widest, BINS + 1)

    def density(values: np.ndarray) -> np.ndarray:
        counts, _ = np.histogram(values, edges)
        return counts / (len(values) * np.diff(edges))

    posterior = None if drawn is None else density(drawn)
    return Densities(title, edges, density(prior), posterior, density(means))


def _posterior_values(posterior: Posterior, layers: _Layers) -> dict[tuple[str, str], np.ndarray]:
    """Return draws of all weights of some factors of layers, without those that are points."""
    random = {k: at for k, at in layers.items() if posterior.stddev[at[0].name].any()}
    count = min(64, max(2, POSTERIOR_VALUES // posterior.num_weights)) if random else 0
    values: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in random}
    for draw in posterior.draws(count):
        for key, (site, index) in random.items():
            values[key].append(draw[site.name][index].detach().cpu().numpy().ravel())
    return {key: np.concatenate(parts) for key, parts in values.items()}


def _prior_values(
    posterior: Posterior, site: Site, index: int, points: dict[str, Tensor]
) -> np.ndarray:
    """Return draws of the prior of one layer; scales that the guide has as points are fixed."""
    here = slice(index, index + 1)
    one = replace(
        site,
        modules=site.modules[here],
        shape=(1, *site.shape[1:]),
        weight_stddevs=site.weight_stddevs[here],
    )
    scales = {
        name: value[here] if value.shape[:1] == site.shape[:1] else value
        for name, value in points.items()
        if name.startswith(f"{site.name}_")
    }
    program = poutine.condition(
        lambda: pyro.sample("weights", posterior.prior.prior(one)), data=scales
    )
    count = min(MOST_PRIOR_DRAWS, max(2, PRIOR_VALUES // (one.shape[1] * one.shape[2])))
    draws = (trace.nodes["weights"]["value"] for trace in traces(program, count))
    return np.concatenate([weights.numpy().ravel() for weights in draws])
