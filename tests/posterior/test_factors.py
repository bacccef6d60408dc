from dataclasses import replace

import pytest
import torch

from blora_pyro.guides import previous_posterior
from blora_pyro.posterior.factors import Factors, posterior_factors, posterior_of, prior_factors
from blora_pyro.posterior.families import Family


def test_moments_of_an_update_are_those_of_its_draws():
    b, a = torch.randn(3, 2).double(), torch.randn(2, 4).double()
    sd_b, sd_a = torch.rand(3, 2).double(), torch.rand(2, 4).double()
    mean, variance = Factors(a, b, sd_a**2, sd_b**2, 1.5).moments()
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
    family = Family(previous_posterior.NAME, {"inflation": 1.0}, "normal")
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
