import pytest
import torch

from blora_pyro.adapters import Group
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.guides.auto_lowrank import RANK
from blora_pyro.models import FactorPrior

GROUPS = (
    Group(("one", "two"), out_features=6, in_features=5, rank=3),
    Group(("three",), out_features=4, in_features=5, rank=3),
)


def started(prior="normal"):
    program = FactorPrior(GROUPS, build_prior(prior), torch.device("cpu"))
    guide = build_guide("auto-lowrank", program)
    with torch.no_grad():
        guide()
    return program, guide


def flat(draw, program):
    return torch.cat([draw[site.name].flatten() for site in program.sites])


def test_it_starts_at_the_base_in_the_mean_with_a_small_scale():
    program, guide = started()
    for site in program.sites:
        mean, stddev = guide.mean()[site.name], guide.stddev()[site.name]
        assert mean.shape == stddev.shape == site.shape
        assert not mean.requires_grad
        assert not stddev.requires_grad
        assert bool((mean == 0).all()) == (site.factor == "B")
        assert mean.abs().max() <= site.shape[-1] ** -0.5
        assert stddev.mean().item() == pytest.approx(0.007, rel=0.1)


def test_its_size_is_ten_numbers_a_weight():
    program, guide = started()
    assert sum(one.numel() for one in guide.parameters()) == (2 + RANK) * program.num_weights


def test_draws_vary_together_as_the_factors_say():
    """Across groups and sites, too; `mean` and `stddev` are the moments of each weight alone."""
    program, guide = started()
    with torch.no_grad():
        guide.loc += torch.randn_like(guide.loc)
        guide.cov_factor.mul_(2)
        draws = torch.stack([flat(guide(), program) for _ in range(3000)])
        factor = guide.cov_factor * guide.scale[:, None]
        expected = factor @ factor.mT + guide.scale.square().diag()
    stddev = expected.diag().sqrt()
    torch.testing.assert_close(flat(guide.stddev(), program), stddev)
    assert ((draws.mean(0) - flat(guide.mean(), program)) / stddev).abs().max() < 5 / 3000**0.5
    correlations = expected / stddev / stddev[:, None]
    off_diagonal = correlations - torch.eye(len(stddev))
    assert off_diagonal.abs().max() > 0.6
    found = torch.corrcoef(draws.mT)
    assert (found - correlations).abs().max() < 6 / 3000**0.5


def test_a_marginal_of_a_scale_is_before_the_transform():
    _, guide = started("horseshoe")
    name = f"{GROUPS[0].A.name}_local"
    own = guide.marginal(name)
    with torch.no_grad():
        draws = torch.stack([guide()[name] for _ in range(2000)]).log()
    assert own.mean.shape == draws.shape[1:]
    error = (draws.mean(0) - own.mean) / own.stddev * 2000**0.5
    assert error.abs().max() < 4
    torch.testing.assert_close(draws.std(0), own.stddev, rtol=0.1, atol=0)
