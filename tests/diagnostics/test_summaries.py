import math
from dataclasses import astuple, replace

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import HalfCauchy, Laplace, LogNormal, Normal, StudentT, kl_divergence

from blora_pyro.diagnostics.summaries import kl_by_site, summarise
from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES
from blora_pyro.guides import build_prior

from .conftest import SQUARE, TALL, fitted, gate_squared, sites_of

MEAN_FIELD = ("normal", "laplace", "student-t", "scale-mixture", "pretrained-scale")


def factors(posterior):
    """(module, factor, mean, stddev) of every layer, in float64."""
    for group in posterior.groups:
        for site in group.sites:
            for i, module in enumerate(site.modules):
                moments = posterior.mean[site.name][i], posterior.stddev[site.name][i]
                yield (module, site.factor, *(value.double() for value in moments))


@pytest.mark.parametrize("guide", ["normal", "auto-normal", "auto-lowrank"])
def test_every_figure_of_a_factor_is_that_of_its_weights(guide):
    posterior = fitted("normal", guide, scale=0.3)
    with torch.no_grad():  # in the guide, too: they share memory
        posterior.mean["B_6x4"].view(-1)[:5] = torch.tensor([0.0, 9e-4, -9e-4, 1e-3, -2e-3])
    rows = summarise(posterior).factors
    expected = list(factors(posterior))
    assert [(row.module, row.factor) for row in rows] == [(m, f) for m, f, _, _ in expected]
    for row, (_, _, mean, sigma) in zip(rows, expected, strict=True):
        ratios = sorted((abs(m) / s for m, s in zip(mean.flatten(), sigma.flatten(), strict=True)))
        count = len(ratios)
        assert row.weights == count == mean.numel()
        contraction = sum(1 - s**2 / 0.3**2 for s in sigma.flatten()) / count
        assert row.contraction == pytest.approx(float(contraction), abs=1e-5)
        assert ratios[(count - 1) // 2] <= row.signal_to_noise + 1e-5
        assert row.signal_to_noise <= ratios[count // 2] + 1e-5
        assert row.share_of_signal == pytest.approx(sum(r > 1 for r in ratios) / count)
        near = sum(abs(m) < 1e-3 for m in mean.flatten().tolist())
        assert row.near_zero == pytest.approx(near / count)
        kl = (0.3 / sigma).log() + (sigma**2 + mean**2) / (2 * 0.3**2) - 0.5
        assert row.kl == pytest.approx(kl.sum().item(), rel=1e-5)
        assert row.active_ranks is None
        assert row.prior_stddev == pytest.approx(0.3)


def test_the_figures_do_vary():
    """So that one row in place of another would show."""
    rows = [astuple(row)[2:] for row in summarise(fitted("normal", scale=0.3)).factors]
    assert len(set(rows)) == len(rows)


def test_the_family_and_the_kl_of_it_all():
    posterior = fitted("learned-scale", spread=0.1)
    summary = summarise(posterior)
    assert (summary.prior, summary.guide, summary.rank) == ("learned-scale", "learned-scale", 2)
    assert summary.prior_args == {}
    assert summary.kl == pytest.approx(sum(row.kl for row in summary.factors))
    assert summarise(fitted("student-t", df=7.0)).prior_args == {"df": 7.0}


def test_a_point_has_a_signal_without_noise_and_no_kl():
    posterior = fitted("normal", "point")
    with torch.no_grad():
        posterior.mean["A_4x4"][1] = 0.0
    summary = summarise(posterior)
    for row in summary.factors:
        zero = (row.module, row.factor) == (SQUARE[1], "A")
        assert row.kl is None
        assert row.contraction == 1
        assert row.signal_to_noise == (0 if zero else math.inf)
        assert row.share_of_signal == (0 if zero else 1)
    assert summary.kl == 0
    assert all(value == 0 for row in summary.updates for value in row.singular_stddevs)
    assert all(row.directions == 2 for row in summary.updates if row.module != SQUARE[1])


def test_a_only_has_noise_in_a_alone():
    posterior = fitted("a-only", scale=0.1)
    rows = summarise(posterior).factors
    for row, (_, factor, mean, sigma) in zip(rows, factors(posterior), strict=True):
        if factor == "B":
            assert row.kl is None
            assert row.signal_to_noise == math.inf
            assert row.contraction == 1
        else:
            kl = (0.1 / sigma).log() + (sigma**2 + mean**2) / (2 * 0.1**2) - 0.5
            assert row.kl == pytest.approx(kl.sum().item(), rel=1e-5)
            assert row.contraction < 1
            assert row.signal_to_noise < math.inf
    assert summarise(posterior).kl == pytest.approx(sum(row.kl or 0 for row in rows))
    of_a = {row.module: (row.kl, row.weights) for row in rows if row.factor == "A"}
    assert summarise(posterior).kl_by_module() == of_a


def test_the_variance_of_learned_scale_is_at_the_fitted_scale():
    posterior = fitted("learned-scale")
    (draw,) = posterior.draws(1)
    rows = iter(summarise(posterior).factors)
    for site in sites_of(posterior):
        scales = draw[f"{site.name}_scale"]
        assert len(set(scales.tolist())) == len(scales)
        for i, scale in enumerate(scales):
            sigma = posterior.stddev[site.name][i]
            row = next(rows)
            assert row.contraction == pytest.approx(1 - float((sigma**2).mean() / scale**2))
            assert row.prior_stddev == pytest.approx(float(scale))


# ---- KL


@pytest.mark.parametrize("prior", MEAN_FIELD)
def test_kl_is_that_of_monte_carlo(prior):
    posterior = fitted(prior, spread=0.05)
    density = build_prior(prior)
    found = kl_by_site(posterior)
    for site in sites_of(posterior):
        q = Normal(posterior.mean[site.name], posterior.stddev[site.name])
        w = q.sample((2000,))
        ratios = q.log_prob(w).sum((2, 3)) - density(site).log_prob(w)  # (draws, modules)
        error = ratios.std(0) / (16 if prior in ("student-t", "scale-mixture") else 2000) ** 0.5
        assert found[site.name].shape == (len(site.modules),)
        assert (abs(found[site.name] - ratios.mean(0)) < 4.5 * error).all()
        assert (error < 0.2 * ratios.mean(0)).all()  # a check worth its name


def test_kl_to_a_laplace_is_the_closed_form():
    posterior = fitted("laplace", scale=0.1)
    for name, found in kl_by_site(posterior).items():
        q = Normal(posterior.mean[name], posterior.stddev[name])
        assert found.tolist() == pytest.approx(
            kl_divergence(q, Laplace(0.0, 0.1)).sum((1, 2)).tolist(), rel=1e-5
        )


def test_kl_without_a_closed_form_is_the_average_of_sixteen_draws():
    posterior = fitted("student-t", df=3.0, scale=0.02)
    found = kl_by_site(posterior)
    prior = StudentT(3.0, 0.0, 0.02)
    for name, mean in posterior.mean.items():
        q = Normal(mean, posterior.stddev[name])
        ratios = [
            (q.log_prob(draw[name]) - prior.log_prob(draw[name])).sum((1, 2))
            for draw in posterior.draws(16)
        ]
        assert not torch.equal(ratios[0], ratios[1])
        torch.testing.assert_close(found[name], torch.stack(ratios).mean(0), rtol=1e-4, atol=1e-3)


def horseshoe_posterior(spread=0.2):
    return fitted("horseshoe", spread=spread, scale=0.04, global_scale=0.02)


def test_the_conditional_kl_of_the_horseshoe_is_averaged_over_its_scales():
    """log q - log p of w given the scales, at many draws of both."""
    posterior = horseshoe_posterior()
    found = kl_by_site(posterior)
    ratios = {site.name: [] for site in sites_of(posterior)}
    for trace in map(guide_trace(posterior), range(300)):
        for site in sites_of(posterior):
            node = trace.nodes[site.name]
            draw = {name: n["value"] for name, n in trace.nodes.items() if "value" in n}
            width = 0.04 * site.per_rank(gate_squared(draw, site)).sqrt()
            p = Normal(0.0, width.expand(site.shape))
            ratio = node["fn"].log_prob(node["value"]) - p.log_prob(node["value"]).sum((1, 2))
            ratios[site.name].append(ratio.detach())
    for site in sites_of(posterior):
        sample = torch.stack(ratios[site.name])
        error = sample.std(0) / len(sample) ** 0.5
        assert (abs(found[site.name] - sample.mean(0)) < 4.5 * error).all()
        assert (error < 0.1 * sample.mean(0)).all()


def guide_trace(posterior):
    def trace(seed):
        pyro.set_rng_seed(seed)
        with torch.no_grad():
            return pyro.poutine.trace(posterior.guide).get_trace()

    return trace


def test_the_kl_of_the_horseshoes_scales_is_log_q_minus_log_p():
    posterior = horseshoe_posterior()
    found = summarise(posterior).scales_kl
    names = [f"{site.name}_{kind}" for site in sites_of(posterior) for kind in ("global", "local")]
    assert sorted(found) == sorted(names)
    for name in names:
        q = guide_trace(posterior)(0).nodes[name]["fn"]  # the same at every draw
        p = HalfCauchy(0.02 if name.endswith("_global") else 1.0)
        ratios = []
        for draw in posterior.draws(16):
            ratios.append((q.log_prob(draw[name]) - p.log_prob(draw[name]).sum()).item())
        assert found[name] == pytest.approx(np.mean(ratios), rel=1e-4, abs=1e-4)
        assert np.std(ratios) > 0


def test_the_kl_of_the_horseshoe_counts_factors_and_scales():
    summary = summarise(horseshoe_posterior())
    factors, scales = (row.kl for row in summary.factors), summary.scales_kl.values()
    assert min(abs(sum(scales)), sum(row.kl for row in summary.factors)) > 1
    assert summary.kl == pytest.approx(sum(factors) + sum(scales))


def test_active_ranks_are_the_sum_of_the_squared_gates():
    posterior = horseshoe_posterior(spread=1.0)
    rows = iter(summarise(posterior).factors)
    draws = list(posterior.draws(400))
    seen = set()
    for site in sites_of(posterior):
        active = torch.stack([gate_squared(draw, site).sum(1) for draw in draws])
        error = active.std(0) / len(draws) ** 0.5
        for i in range(len(site.modules)):
            row = next(rows)
            assert abs(row.active_ranks - active.mean(0)[i]) < 4.5 * error[i] + 1e-3
            assert 0 < row.active_ranks < 2
            seen.add(row.active_ranks)
    assert len(seen) == 10


USER_FILE = """
import pyro, pyro.distributions as dist, torch
from blora_pyro.guides import normal

class Prior:
    def __call__(self, site):
        width = pyro.sample(f"{site.name}_width", dist.LogNormal(-3.0, 1.0))
        return dist.Normal(0.0, width).expand(site.shape).to_event(2)

class Guide(normal.Guide):
    def distribution(self, site):
        pyro.sample(f"{site.name}_width", dist.LogNormal(-1.0, 0.5))
        return super().distribution(site)
"""


def test_kl_given_scales_is_averaged_over_them_even_where_their_own_kl_is_closed(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    posterior = fitted(str(path))
    found = kl_by_site(posterior)
    draws = list(posterior.draws(16))
    of_scale = kl_divergence(Normal(-1.0, 0.5), Normal(-3.0, 1.0))
    for site in sites_of(posterior):
        q = Normal(posterior.mean[site.name], posterior.stddev[site.name])
        each = [kl_divergence(q, Normal(0.0, d[f"{site.name}_width"])).sum((1, 2)) for d in draws]
        torch.testing.assert_close(found[site.name], torch.stack(each).mean(0))
        torch.testing.assert_close(found[f"{site.name}_width"], of_scale)


@pytest.mark.parametrize("guide", ["auto-normal", "auto-lowrank"])
def test_pyros_own_under_a_hierarchical_prior_have_a_kl_of_its_scales(guide):
    posterior = fitted("horseshoe", guide, global_scale=0.01)
    summary = summarise(posterior)
    assert all(math.isfinite(row.kl) for row in summary.factors)
    assert len(summary.scales_kl) == 8
    for name, found in summary.scales_kl.items():
        with torch.no_grad():
            if guide == "auto-normal":
                q = LogNormal(*posterior.guide._get_loc_and_scale(name))
            else:
                own = posterior.guide.marginal(name)
                q = LogNormal(own.mean, own.stddev)
        p = HalfCauchy(0.01 if name.endswith("_global") else 1.0)
        ratios = [
            (q.log_prob(draw[name]) - p.log_prob(draw[name])).sum().item()
            for draw in posterior.draws(16)
        ]
        assert found == pytest.approx(np.mean(ratios), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("prior", FAMILIES)
def test_every_family_is_summarised(prior):
    summary = summarise(fitted(prior))
    assert len(summary.factors) == 10
    assert [row.module for row in summary.updates] == [*SQUARE, *TALL]
    assert math.isfinite(summary.kl)
    hierarchical = {"horseshoe": 8}
    assert len(summary.scales_kl) == hierarchical.get(prior, 0)
    assert all((row.active_ranks is not None) == (prior == "horseshoe") for row in summary.factors)


def test_moments_alone_are_summarised_where_the_prior_is_a_density_of_weights():
    posterior = fitted("normal", scale=0.3)
    pruned = replace(posterior, state={})
    for row, own in zip(summarise(pruned).factors, summarise(posterior).factors, strict=True):
        assert astuple(row)[:2] == astuple(own)[:2]
        assert astuple(row)[2:8] == pytest.approx(astuple(own)[2:8], rel=1e-4)


def test_moments_alone_under_a_hierarchical_prior_have_no_kl():
    summary = summarise(replace(fitted("horseshoe"), state={}))
    assert all(row.kl is None and row.active_ranks is None for row in summary.factors)
    assert summary.scales_kl == {}
    assert all(math.isfinite(row.contraction) for row in summary.factors)
    assert summary.kl == 0


def test_a_prior_whose_code_was_not_named_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from blora_pyro.guides.normal import Guide, Prior\n")
    posterior = fitted(str(path))
    summarise(posterior)
    unnamed = replace(posterior, family=replace(posterior.family, runs_code=False))
    with pytest.raises(UserError, match="--prior"):
        summarise(unnamed)
