"""A problem with a known answer: a sparse update of rank 2, planted under noise, fitted at rank 8.

Linear regression y = (W0 + ΔW) x + noise, through the same groups, priors, guides and adapters as
Whisper. Normal and Laplace have the same standard deviation, the horseshoe a slab that lets the
planted ranks through.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from blora_pyro.adapters import Adapters, group_by_shape
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior

SIZE, RANK, PLANTED, OBSERVATIONS, NOISE = 24, 8, 2, 200, 0.5
STEPS, LR = 800, 0.05
PRIORS = {
    "normal": {"scale": 0.1},
    "laplace": {"scale": 0.1 / 2**0.5},
    "horseshoe": {"scale": 0.5, "global_scale": 0.05},
}


class Regression(FactorPrior):
    def __init__(self, layer, prior, x, y):
        net = nn.ModuleDict({"layer": layer})
        super().__init__(group_by_shape({"layer": layer}, RANK), prior, torch.device("cpu"))
        self.layer, self.x, self.y = layer, x, y
        self.adapters = Adapters(net, self.groups, alpha=RANK)

    def __call__(self, *args):
        self.adapters.put(self.draw())
        with pyro.plate("observations", len(self.x)):
            pyro.sample("y", dist.Normal(self.layer(self.x), NOISE).to_event(1), obs=self.y)


def plant():
    """ΔW of rank 2: twice an outer product of four ones and four halves, each in its own places."""
    a, b = torch.zeros(PLANTED, SIZE), torch.zeros(SIZE, PLANTED)
    for r in range(PLANTED):
        a[r, torch.randperm(SIZE)[:4]] = 1.0
        b[torch.randperm(SIZE)[:4], r] = 0.5
    return b @ a


def fit(prior, seed):
    torch.manual_seed(seed)
    planted = plant()
    layer = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    x = torch.randn(OBSERVATIONS, SIZE)
    y = x @ (layer.weight + planted).T + NOISE * torch.randn(OBSERVATIONS, SIZE)
    model = Regression(layer, build_prior(prior, **PRIORS[prior]), x, y)
    guide = build_guide(prior, model)
    optimizer = torch.optim.Adam(guide.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    elbo = TraceMeanField_ELBO()
    for _ in range(STEPS):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
        schedule.step()
    mean, (group,) = guide.mean(), model.groups
    update = mean[group.B.name][0] @ mean[group.A.name][0]
    unshrunken = torch.linalg.lstsq(x, y).solution.T - layer.weight
    return guide, update, planted, unshrunken


@pytest.fixture(scope="module", params=[0])
def fits(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pyro.validation_enabled(False):  # a fifth of the time of so small a problem
        yield {prior: fit(prior, request.param) for prior in PRIORS}
    torch.set_num_threads(threads)


def unused(update):
    """Singular values beyond the planted rank, falling."""
    return torch.linalg.svdvals(update)[PLANTED:RANK]


def test_every_prior_finds_the_planted_ranks(fits):
    for _, update, planted, _ in fits.values():
        found, true = (torch.linalg.svdvals(x)[:PLANTED] for x in (update, planted))
        torch.testing.assert_close(found, true, rtol=0.15, atol=0)


@pytest.mark.parametrize("prior", ["laplace", "horseshoe"])
def test_unused_ranks_are_shrunk_more_than_by_the_normal_prior(fits, prior):
    assert unused(fits[prior][1]).sum() < 0.6 * unused(fits["normal"][1]).sum()


@pytest.mark.parametrize("prior", ["laplace", "horseshoe"])
def test_unused_ranks_are_switched_off(fits, prior):
    _, update, _, unshrunken = fits[prior]  # one rank may hold on to the noise's best direction
    assert (unused(update)[1:] < 0.02 * unused(unshrunken)[1:]).all()


@pytest.mark.parametrize("prior", ["laplace", "horseshoe"])
def test_the_planted_ranks_are_shrunk_less_than_by_the_normal_prior(fits, prior):
    (_, update, planted, _), (_, by_normal, *_) = fits[prior], fits["normal"]
    assert (update - planted).norm() < (by_normal - planted).norm()


def test_the_horseshoe_says_which_ranks_it_uses(fits):
    factors = fits["horseshoe"][0].shrinkage().values()
    open_in_a, open_in_b = (factor[0] < 0.5 for factor in factors)
    assert int((open_in_a & open_in_b).sum()) == PLANTED
    assert (torch.stack([factor[0] for factor in factors]).amax(0) > 0.9).sum() == RANK - PLANTED
