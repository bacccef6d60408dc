import pytest
import torch
from torch.distributions import Normal, kl_divergence

from blora_pyro.guides.mean_field import MeanFieldNormal

SHAPE = (2, 3, 5)
PRIORS = {
    "one scale": lambda: Normal(0.0, 0.05).expand(SHAPE),
    "a scale a module": lambda: Normal(0.0, torch.tensor([0.1, 0.4])[:, None, None]).expand(SHAPE),
    "a posterior": lambda: Normal(torch.randn(SHAPE), 0.1 + torch.rand(SHAPE)),
    "of fewer dimensions": lambda: Normal(torch.tensor(0.3), torch.tensor(0.2)),
}


def moments():
    torch.manual_seed(0)
    mean = torch.randn(SHAPE, requires_grad=True)
    return mean, (0.01 + torch.rand(SHAPE)).requires_grad_()


@pytest.fixture(params=PRIORS)
def prior(request):
    torch.manual_seed(1)
    return PRIORS[request.param]()


def test_kl_and_its_gradients_are_those_of_torch(prior):
    weights = torch.rand(SHAPE)
    found = []
    for kind in (Normal, MeanFieldNormal):
        mean, scale = moments()
        kl = kl_divergence(kind(mean, scale), prior)
        (weights * kl).sum().backward()
        found.append((kl.detach(), mean.grad, scale.grad))
    for ours, torchs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_the_gradients_are_those_of_differences(prior):
    mean, scale = (one.detach().double().requires_grad_() for one in moments())
    prior = Normal(prior.loc.double(), prior.scale.double())
    assert torch.autograd.gradcheck(
        lambda *own: kl_divergence(MeanFieldNormal(*own), prior), (mean, scale)
    )


def test_a_prior_that_is_learned_gets_its_gradient():
    found = []
    for kind in (Normal, MeanFieldNormal):
        width = torch.tensor(0.3, requires_grad=True)
        kl_divergence(kind(*moments()), Normal(0.0, width).expand(SHAPE)).sum().backward()
        found.append(width.grad)
    assert found[0] == found[1] != 0


def test_what_it_is_stays_when_it_is_expanded():
    expanded = MeanFieldNormal(torch.zeros(3, 1), torch.ones(3, 1)).expand((2, 3, 5)).to_event(2)
    assert isinstance(expanded.base_dist, MeanFieldNormal)
