import math
from dataclasses import replace

import pytest
import torch

from blora_pyro.errors import UserError
from blora_pyro.families import PREVIOUS_POSTERIOR
from blora_pyro.posterior import Family
from blora_pyro.posterior.combining import (
    LayerFactors,
    check_alike,
    combine,
    multiply,
    posterior_factors,
    posterior_of,
    prior_factors,
)
from blora_pyro.posterior.pruning import prune


def deltas(posterior):
    return {name: delta.double() for name, delta in posterior.delta_weights()}


def variances(posterior):
    return {name: one.moments()[1] for name, one in posterior_factors(posterior).items()}


def close(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


@pytest.fixture
def pair(random_posterior):
    """Of different rank and scaling."""
    return random_posterior(1), random_posterior(2, rank=3, alpha=9.0)


# ---- factors of a layer


def test_moments_of_an_update_are_those_of_its_draws():
    b, a = torch.randn(3, 2).double(), torch.randn(2, 4).double()
    sd_b, sd_a = torch.rand(3, 2).double(), torch.rand(2, 4).double()
    mean, variance = LayerFactors(a, b, sd_a**2, sd_b**2, 1.5).moments()
    count = 200_000
    draws_b = b + sd_b * torch.randn(count, 3, 2).double()
    draws = 1.5 * draws_b @ (a + sd_a * torch.randn(count, 2, 4).double())
    error = (variance / count).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)


def test_moments_of_the_prior_are_those_of_normals(random_posterior):
    posterior = random_posterior(1)
    for one in prior_factors(posterior).values():
        mean, variance = one.moments()
        assert (mean == 0).all()
        expected = torch.full_like(variance, 1.5**2 * 4 * posterior.family.prior_args["scale"] ** 4)
        torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0)


def test_moments_of_a_chained_prior_are_those_of_the_run_before(random_posterior):
    earlier = random_posterior(1)
    tensors = {f"{name}.mean": value for name, value in earlier.mean.items()}
    tensors |= {f"{name}.stddev": value for name, value in earlier.stddev.items()}
    family = Family(PREVIOUS_POSTERIOR, {"inflation": 1.0}, "normal")
    later = replace(random_posterior(2), family=family, prior_tensors=tensors)
    for one, two in zip(
        prior_factors(later).values(), posterior_factors(earlier).values(), strict=True
    ):
        for found, expected in zip(one.moments(), two.moments(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"rank": 3, "alpha": 9.0, "targets": "q_proj,fc1"}])
def test_a_posterior_of_its_own_factors_is_that_posterior(random_posterior, options):
    posterior = random_posterior(1, **options)
    found = posterior_of(posterior, posterior_factors(posterior))
    assert (found.groups, found.alpha, found.base) == (
        posterior.groups,
        posterior.alpha,
        posterior.base,
    )
    torch.testing.assert_close(found.mean, posterior.mean)
    torch.testing.assert_close(found.stddev, posterior.stddev)


# ---- mean and weighted


@pytest.mark.parametrize("weights", [None, (0.25, 0.75), (1, 1), (1.0, -0.5), (0, 2)])
def test_a_sum_is_held_exactly_with_its_spread(pair, weights):
    w = weights or (0.5, 0.5)
    found, kept = combine(pair, "weighted" if weights else "mean", weights=weights)
    assert kept == 1 and found.rank == 7
    one, two = (deltas(posterior) for posterior in pair)
    close(deltas(found), {name: w[0] * one[name] + w[1] * two[name] for name in one})
    one, two = (variances(posterior) for posterior in pair)
    wanted = {name: w[0] ** 2 * one[name] + w[1] ** 2 * two[name] for name in one}
    close(variances(found), wanted, atol=1e-7)


@pytest.mark.parametrize("rank", [None, 4, 7])
def test_the_mean_of_a_run_and_itself_is_that_run(random_posterior, rank):
    run = random_posterior(1)
    found, kept = combine([run, run], "mean", rank=rank)
    close(deltas(found), deltas(run))
    assert kept == pytest.approx(1, abs=1e-6)


def test_of_a_lower_rank_it_is_the_best_approximation(pair):
    whole, found = combine(pair, "mean")[0], combine(pair, "mean", rank=3)
    kept, squares = 0.0, 0.0
    for name, delta in deltas(whole).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        torch.testing.assert_close(
            deltas(found[0])[name], u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5
        )
        kept, squares = kept + float((s[:3] ** 2).sum()), squares + float((s**2).sum())
    assert found[1] == pytest.approx(math.sqrt(kept / squares), rel=1e-5)
    assert 0.5 < found[1] < 0.99
    assert next(found[0].draws(1))


def test_pruned_runs_and_ranks_that_differ_by_layer_are_summed_too(random_posterior):
    one, two = prune(random_posterior(1), rank=2), random_posterior(2)
    mean = {name: value.clone() for name, value in two.mean.items()}
    mean["B_16x16"][0, :, 1:] = 0
    two = prune(replace(two, mean=mean), rank=4)
    assert len({group.rank for group in two.groups}) == 2
    found, _ = combine([one, two], "mean")
    one, two = deltas(one), deltas(two)
    close(deltas(found), {name: (one[name] + two[name]) / 2 for name in one})


def test_runs_that_cancel_each_other_out_are_refused(random_posterior):
    run = random_posterior(1)
    with pytest.raises(UserError, match="cancel each other out"):
        combine([run, run], "weighted", weights=(1, -1), rank=2)


# ---- product


def test_a_product_is_the_posterior_of_all_data_where_everything_is_gaussian():
    """ΔW = b a with b known: each element of a has a Gaussian posterior, as it is computed here."""
    b = torch.tensor([[2.0]]).double()
    variance0, noise, size = 0.7, 1.3, 5

    def posterior(y):
        """Of `a`, from y = b a + noise."""
        precision = 1 / variance0 + len(y) * float(b) ** 2 / noise**2
        mean = float(b) * y.sum(0) / noise**2 / precision
        return LayerFactors(
            mean[None], b, torch.full((1, size), 1 / precision).double(), torch.zeros_like(b), 1.0
        )

    data = [torch.randn(count, size).double() for count in (4, 1, 9)]
    prior = LayerFactors(
        torch.zeros(1, size).double(),
        b,
        torch.full((1, size), variance0).double(),
        torch.zeros_like(b),
        1.0,
    )
    found = multiply([posterior(y) for y in data], [prior] * 3)
    torch.testing.assert_close(found, posterior(torch.cat(data)).moments()[0])


def test_a_product_is_the_formula_element_by_element(pair):
    found, kept = combine(pair, "product", rank=16)
    assert kept == pytest.approx(1)
    runs, priors = [posterior_factors(p) for p in pair], [prior_factors(p) for p in pair]
    delta = deltas(found)
    for name, value in delta.items():
        (m1, v1), (m2, v2) = (run[name].moments() for run in runs)
        (_, p1), (_, p2) = (prior[name].moments() for prior in priors)
        v1, v2 = v1.minimum(p1), v2.minimum(p2)
        precision = 1 / v1 + 1 / v2 - (1 / p1 + 1 / p2) / 2
        wanted = (m1 / v1 + m2 / v2) / precision
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)
        assert (wanted.abs() <= (m1.abs() + m2.abs()) * (1 + 1e-6)).all()


@pytest.mark.parametrize("count", [2, 3])
def test_a_product_of_a_run_and_itself_keeps_its_mean_under_a_flat_prior(random_posterior, count):
    flat = Family("normal", {"scale": 1e4})
    run = replace(random_posterior(1), family=flat)
    found, kept = combine([run] * count, "product")
    assert found.rank == 4 and kept == pytest.approx(1, abs=1e-6)
    close(deltas(found), deltas(run))


def test_where_the_data_said_nothing_but_the_prior_updates_add(random_posterior):
    run = random_posterior(1, spread=20.0)  # wider than the prior
    found, _ = combine([run, run], "product")
    close(deltas(found), {name: 2 * delta for name, delta in deltas(run).items()})


def test_the_surer_run_weighs_more(random_posterior):
    sure, unsure = random_posterior(1, spread=0.001), random_posterior(2, spread=0.1)
    found, _ = combine([unsure, sure], "product", rank=16)
    wanted = deltas(sure)
    for name, delta in deltas(found).items():
        assert (delta - wanted[name]).norm() < 0.01 * wanted[name].norm()


def test_a_product_has_no_spread(pair):
    found, _ = combine(pair, "product")
    assert not any(value.any() for value in found.stddev.values())
    (draw,) = found.draws(1)
    assert all(torch.equal(value, found.mean[name]) for name, value in draw.items())


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "median"}, "method is 'median'; give one of product, mean, weighted"),
        ({"method": "weighted"}, "method is weighted and weights are not given"),
        ({"method": "mean", "weights": (1, 2)}, "method is mean and weights are given"),
        ({"method": "weighted", "weights": (1,)}, "1 weights are given for 2 runs"),
        ({"method": "weighted", "weights": (0, 0)}, "weights are 0, 0; give finite numbers"),
        ({"method": "weighted", "weights": (1, math.nan)}, "weights are 1, nan"),
        ({"rank": 0}, "rank is 0; give a number from 1 to 16"),
        ({"rank": 17}, "rank is 17; give a number from 1 to 16"),
    ],
)
def test_options_that_cannot_be_are_refused(pair, options, words):
    with pytest.raises(UserError, match=words):
        combine(pair, **options)


def test_one_run_is_no_combination(random_posterior):
    with pytest.raises(UserError, match="1 run is given; give two or more"):
        combine([random_posterior(1)])


def test_runs_that_do_not_match_are_refused(random_posterior):
    one = random_posterior(1)
    other_weights = replace(one.groups[0], weight_stddevs=(9.0,) * len(one.groups[0].modules))
    others = {
        "a was fitted on tiny, b on big; give runs of one base": replace(one, base="big"),
        r"a was fitted on tiny, b on tiny \(revision v2\)": replace(one, revision="v2"),
        r"a adapts 32 layers, b 6, and they differ in 26": random_posterior(1, targets="q_proj"),
        r"fitted on other weights under one name": replace(
            one, groups=(other_weights, *one.groups[1:])
        ),
    }
    with pytest.raises(UserError, match="run 1 adapts 32 layers, run 3 6"):
        combine([one, one, random_posterior(1, targets="q_proj")])
    check_alike(one, random_posterior(2, rank=2, alpha=1.0), ("a", "b"))
    for words, other in others.items():
        with pytest.raises(UserError, match=words):
            check_alike(one, other, ("a", "b"))
