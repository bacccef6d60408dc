import dataclasses
from statistics import median

import pytest
import torch

from blora_pyro.diagnostics import FactorSummary, Summary, UpdateSummary, summarise
from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks
from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES, PREVIOUS_POSTERIOR
from blora_pyro.guides import load_family, prior_arguments

from .conftest import fitted


def factor(module, name, kl=10.0, weights=100, **changes):
    values = {
        "contraction": 0.5,
        "signal_to_noise": 1.5,
        "share_of_signal": 0.6,
        "near_zero": 0.25,
        "active_ranks": None,
        "prior_stddev": 0.05,
    }
    return FactorSummary(module, name, weights, kl=kl, **{**values, **changes})


def update(module, directions=2, stddevs=(0.1, 0.1, 0.1, 0.1)):
    return UpdateSummary(module, 1.0, 0.02, (0.9, 0.4, 0.05, 0.01), stddevs, 2.1, directions)


def summary(prior="normal", **changes):
    modules = [f"model.decoder.layers.{i}.fc1" for i in range(3)]
    values = {
        "prior": prior,
        "prior_args": prior_arguments(prior) if prior in FAMILIES else {},
        "guide": prior,
        "rank": 4,
        "factors": tuple(
            factor(m, f, kl=10.0 + 90 * (m[-5] == "1")) for m in modules for f in "AB"
        ),
        "updates": tuple(update(module) for module in modules),
        "scales_kl": {},
    }
    return Summary(**{**values, **changes})


FIGURES = Shrinkage(
    directions=6,
    median_directions=2.0,
    all_directions=12,
    effective_rank=2.1,
    near_zero=0.25,
    peak=7.0,
    layers=3,
    kl_floor=0.1,
    floor_share=0.4,
    half_kl_layers=1,
    active_ranks=None,
    closed_ranks=None,
)


def test_an_earlier_posterior_as_prior_is_explained():
    args = {"inflation": 2.0}
    text = how_it_shrinks(summary(PREVIOUS_POSTERIOR, prior_args=args), FIGURES, 1e-4)
    assert text.startswith("The prior is an earlier run's posterior, its deviations times 2:")


@pytest.mark.parametrize("prior", FAMILIES)
def test_every_family_is_explained_with_the_figures_of_the_run(prior):
    horseshoe = prior == "horseshoe"
    figures = dataclasses.replace(
        FIGURES, active_ranks=1.5 if horseshoe else None, closed_ranks=0.62 if horseshoe else None
    )
    assert load_family(prior).EXPLANATION
    text = how_it_shrinks(summary(prior), figures, 1e-4)
    assert "{" not in text
    assert "6 of 12 directions of ΔW stand above their spread (2 of 4 in the median" in text
    assert "25% of the weights have |mean| < 0.001" in text
    assert "40% of the weights' KL is a floor" in text
    assert "half sits in 1 of 3 layers" in text
    assert ("Of 4 ranks 1.5 are active in the median layer" in text) == horseshoe
    assert ("62% of all ranks are switched off" in text) == horseshoe


def test_the_explanation_names_the_fitted_widths():
    rows = tuple(
        dataclasses.replace(row, prior_stddev=0.01 * (i + 1))
        for i, row in enumerate(summary().factors)
    )
    text = how_it_shrinks(summary("learned-scale", factors=rows), FIGURES, 1e-4)
    assert "from 0.01 to 0.06" in text


def own_prior(tmp_path, explanation=""):
    file = tmp_path / "own.py"
    file.write_text(f"from blora_pyro.guides.normal import Guide, Prior\n{explanation}\n")
    return summary(prior_args={"width": 3}), str(file)


def test_a_users_own_prior_gets_a_general_text(tmp_path):
    own, file = own_prior(tmp_path)
    text = how_it_shrinks(dataclasses.replace(own, prior=file), FIGURES, 1e-4)
    assert text.startswith(f"The prior is your own code ({file})")
    assert "of 12 directions" in text


def test_a_users_own_prior_may_explain_itself(tmp_path):
    own, file = own_prior(tmp_path, 'EXPLANATION = "Width {width:g}, rank {rank}."')
    text = how_it_shrinks(dataclasses.replace(own, prior=file), FIGURES, 1e-4)
    assert text.startswith("Width 3, rank 4. To compare")
    own, file = own_prior(tmp_path, 'EXPLANATION = "Width {breadth:g}."')
    with pytest.raises(UserError, match=r"can't be filled in \('breadth'\); name arguments"):
        how_it_shrinks(dataclasses.replace(own, prior=file), FIGURES, 1e-4)


def test_points_and_beta_0_are_explained():
    figures = dataclasses.replace(
        FIGURES, directions=None, kl_floor=None, floor_share=None, half_kl_layers=None, peak=None
    )
    text = how_it_shrinks(summary(guide="point"), figures, 0.0)
    assert "The guide is a point" in text
    assert "the prior had no say" in text
    assert "effective rank is 2.1" in text
    assert "directions" not in text
    assert "floor" not in text
    assert "largest |mean|" not in text


def test_a_high_floor_is_explained():
    high = dataclasses.replace(FIGURES, floor_share=0.97)
    assert "compare layers, not totals" in how_it_shrinks(summary(), high, 1e-4)
    assert "compare layers, not totals" not in how_it_shrinks(summary(), FIGURES, 1e-4)


def test_the_figures_of_a_run(finished_run):
    posterior = finished_run.posterior
    found = summarise(posterior)
    figures = Shrinkage.of(posterior, found)
    assert figures.layers == len(found.updates)
    assert figures.directions == sum(row.directions for row in found.updates)
    assert figures.median_directions == median(row.directions for row in found.updates)
    assert figures.all_directions == 4 * figures.layers
    ranks = [row.effective_rank for row in found.updates]
    assert min(ranks) < figures.effective_rank < max(ranks)
    shares = posterior.sparsity()
    assert min(shares["A"], shares["B"]) <= figures.near_zero <= max(shares["A"], shares["B"])
    means = torch.cat([mean.abs().flatten() for mean in posterior.mean.values()])
    assert figures.peak == pytest.approx(float(means.max() / means.median()))
    totals = found.kl_by_module()
    assert figures.kl_floor == min(kl / weights for kl, weights in totals.values())
    floor = figures.kl_floor * posterior.num_weights
    assert figures.floor_share == pytest.approx(floor / found.kl, rel=1e-5)
    assert 1 <= figures.half_kl_layers <= figures.layers / 2
    assert figures.active_ranks is None and figures.closed_ranks is None


def test_the_horseshoe_has_ranks():
    posterior = fitted("horseshoe")
    figures = Shrinkage.of(posterior, summarise(posterior))
    assert 0 <= figures.active_ranks <= 2
    assert 0 <= figures.closed_ranks <= 1


def test_points_have_no_directions():
    posterior = fitted("normal", "point")
    figures = Shrinkage.of(posterior, summarise(posterior))
    assert figures.directions is figures.kl_floor is figures.half_kl_layers is None
    assert figures.effective_rank >= 1
