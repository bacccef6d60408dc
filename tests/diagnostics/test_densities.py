import numpy as np
import pytest
import torch

from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.densities import densities
from blora_pyro.diagnostics.layers import LayerPosition

from .conftest import fitted

WIDTHS = {"normal": 1.0, "laplace": 2**0.5}  # standard deviation in units of the scale


def moment(one, values):
    centers = (one.edges[1:] + one.edges[:-1]) / 2
    return float((values * np.diff(one.edges) * centers**2).sum())


def test_a_and_b_of_the_layers_with_most_and_least_kl_a_weight(finished_run):
    summary = summarise(finished_run.posterior)
    found = densities(finished_run.posterior, summary)
    sizes = {name: kl / weights for name, (kl, weights) in summary.kl_by_module().items()}
    most, least = (LayerPosition.of(of(sizes, key=sizes.get)).label for of in (max, min))
    assert [one.title for one in found] == [
        f"{factor} of {label} ({remark} KL a weight)"
        for label, remark in ((most, "most"), (least, "least"))
        for factor in "AB"
    ]


@pytest.mark.parametrize("prior", WIDTHS)
def test_densities_have_the_moments_of_prior_and_posterior(prior):
    posterior = fitted(prior, spread=0.02, scale=0.05)
    for one in densities(posterior, summarise(posterior)):
        assert (one.means * np.diff(one.edges)).sum() == pytest.approx(1)
        width = WIDTHS[prior] * 0.05
        assert moment(one, one.prior) == pytest.approx(width**2, rel=0.1)
        module = next(
            n for g in posterior.groups for n in g.modules if LayerPosition.of(n).label in one.title
        )
        site, index = next(
            (site, site.modules.index(module))
            for g in posterior.groups
            for site in g.sites
            if module in site.modules and site.factor == one.title[0]
        )
        mean, sd = posterior.mean[site.name][index], posterior.stddev[site.name][index]
        assert moment(one, one.posterior) == pytest.approx(float((mean**2 + sd**2).mean()), rel=0.1)


def test_a_prior_with_a_width_a_layer_is_that_layers():
    posterior = fitted("learned-scale", spread=0.02)
    for i, (name, value) in enumerate(posterior.state.items()):
        if name.startswith("log_scales"):
            value.copy_(torch.linspace(-5, -2, len(value)) + 0.1 * i)
    summary = summarise(posterior)
    widths = {
        (LayerPosition.of(row.module).label, row.factor): row.prior_stddev
        for row in summary.factors
    }
    for one in densities(posterior, summary):
        label = one.title.partition(" of ")[2].partition(" (")[0]
        width = widths[label, one.title[0]]
        centers = (one.edges[1:] + one.edges[:-1]) / 2
        middle = abs(centers) < width
        # 0.683 within one standard deviation, to a bin's width
        share = float((one.prior * np.diff(one.edges))[middle].sum())
        assert share == pytest.approx(0.683, abs=0.1)


def test_points_have_means_only():
    posterior = fitted("normal", "point")
    found = densities(posterior, summarise(posterior))
    assert all(one.posterior is None for one in found)
    assert "most ΔW" in found[0].title


def test_the_horseshoe_is_sharper_than_a_normal():
    posterior = fitted("horseshoe", spread=0.02)
    for one in densities(posterior, summarise(posterior)):
        middle = len(one.prior) // 2
        assert one.prior[middle] > 2 / (0.05 * (2 * np.pi) ** 0.5)
        assert one.posterior is not None
