"""A linear-Gaussian problem whose posterior is known, through the real stacked machinery.

Two linear layers of one shape observe y ~ N(x (W0 + s B A)ᵀ, noise²), s = alpha / rank. With A
fixed, z = x Aᵀ are the regressors of B, and their columns are made orthogonal, so that every
element of B is independent of the others given y: mean-field is exact. With a KL weight beta the
optimum of E[-log p(y | B)] + beta · KL(q || p) is Gaussian with

    precision = 1 / scale² + s² |z_r|² / (beta noise²),  r the column,
    mean      = s z_rᵀ (y - x W0ᵀ) / (beta noise²) / precision.

With A open, too, nothing is known in closed form, and one layer of rank 1 is held against NUTS.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.distributions import kl_divergence

from blora_pyro.adapters import Adapters, group_by_shape
from blora_pyro.fitting.natural_gradient import natural_step
from blora_pyro.guides import auto_lowrank, normal, previous_posterior
from blora_pyro.guides.normal import Guide, Prior
from blora_pyro.models import Temper

OUT, IN, RANK, ROWS = 24, 4, 2, 12
ALPHA, SCALE, NOISE = 6.0, 0.5, 2.0
S = ALPHA / RANK
COLUMN_NORMS = torch.tensor([[1.0, 2.0], [1.5, 3.0]])  # |z_r| for layers and columns
A, B = f"A_{OUT}x{IN}", f"B_{OUT}x{IN}"


class Linear:
    """A Pyro model with the attributes that guides ask for: `groups`, `sites` and `device`."""

    device = torch.device("cpu")

    def __init__(self, net, prior, rank=RANK):
        self.net = net.requires_grad_(False)
        self.prior = prior
        self.adapters = Adapters(net, group_by_shape(dict(net.named_children()), rank), ALPHA)
        self.groups = self.adapters.groups
        self.sites = self.groups[0].sites

    def __call__(self, x, y):
        (group,) = self.groups
        with group.plate():
            factors = {site.name: pyro.sample(site.name, self.prior(site)) for site in group.sites}
        self.adapters.put(factors)
        for i, name in enumerate(group.modules):
            mean = self.net.get_submodule(name)(x[i])
            pyro.sample(f"y_{name}", dist.Normal(mean, NOISE).to_event(2), obs=y[i])


@pytest.fixture
def problem():
    """Model, A (2, rank, in), x (2, rows, in) and y (2, rows, out)."""
    net = nn.ModuleDict({"first": nn.Linear(IN, OUT), "second": nn.Linear(IN, OUT)})
    model = Linear(net, Prior(SCALE))
    a = torch.randn(2, RANK, IN)
    z = torch.linalg.qr(torch.randn(2, ROWS, RANK)).Q * COLUMN_NORMS[:, None, :]
    b = SCALE * torch.randn(2, OUT, RANK)
    return model, a, *observations(model, a, b, z)


def observations(model, a, b, z):
    """x with x Aᵀ = z, and y."""
    x = z @ torch.linalg.pinv(a).mT
    with torch.no_grad():
        base = torch.stack([layer(x[i]) for i, layer in enumerate(model.net.values())])
    return x, base + S * z @ b.mT + NOISE * torch.randn(2, ROWS, OUT)


def known_posterior(model, a, x, y, beta):
    """Mean and standard deviation of B, (2, out, rank), by the formula, from x, y and A alone."""
    moments = []
    for i, layer in enumerate(model.net.values()):
        z = (x[i] @ a[i].mT).double()
        residual = (y[i] - x[i] @ layer.weight.mT - layer.bias).double()
        weight = 1 / (beta * NOISE**2)
        precision = torch.eye(RANK) / SCALE**2 + S**2 * weight * z.mT @ z
        covariance = torch.linalg.inv(precision)
        off_diagonal = covariance - covariance.diag().diag()
        assert off_diagonal.abs().max() < 1e-5 * covariance.max()  # mean-field is exact
        mean = S * weight * residual.mT @ z @ covariance
        moments.append((mean, covariance.diag().sqrt().expand(OUT, RANK)))
    means, stddevs = zip(*moments, strict=True)
    return torch.stack(means).float(), torch.stack(stddevs).float()


@pytest.fixture
def signs(monkeypatch):
    """Noise of +1 and -1 in turn, for every shape of factors.

    It has the first two moments of normal noise, and a loss that is quadratic in weights that are
    independent of each other asks for no more: the ELBO of two particles is exact.
    """
    last: dict[torch.Size, float] = {}

    def noise(shape, dtype, device):
        last[shape] = -last.get(shape, -1.0)
        return torch.full(shape, last[shape], dtype=dtype, device=device)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", noise)


def fit(model, guide, a, x, y, beta):
    """L-BFGS on B."""
    temper = Temper(beta)
    conditioned = temper(poutine.condition(model, data={A: a}))
    blocked = temper(poutine.block(guide, hide=[A]))
    elbo = TraceMeanField_ELBO(num_particles=2)
    minimise(
        [guide.means[B], guide.rhos[B]],
        lambda: elbo.differentiable_loss(conditioned, blocked, x, y),
    )


def minimise(parameters, loss):
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_svi_recovers_the_known_posterior(problem, signs, beta):
    model, a, x, y = problem
    mean, stddev = known_posterior(model, a, x, y, beta)
    contraction = 1 - (stddev / SCALE) ** 2
    assert 0.3 < contraction.min()  # neither the prior nor the likelihood alone
    assert contraction.max() < 0.995

    guide = Guide(model)
    fit(model, guide, a, x, y, beta)
    assert ((guide.mean()[B] - mean) / stddev).abs().max() < 0.01
    torch.testing.assert_close(guide.stddev()[B], stddev, rtol=0.01, atol=0)


@pytest.mark.parametrize(("start", "beta"), [(0.1, 0.25), (10.0, 1.0)])
def test_deviations_converge_by_natural_gradient_from_any_start(problem, start, beta):
    """With a fit's own noise, of one draw a step.

    The rows of B share a deviation. Their mean square is to be within 5% of it; that of one weight
    has the noise of one weight, √2 / √400 of a precision at the very least.
    """
    model, a, x, y = problem
    mean, stddev = known_posterior(model, a, x, y, beta)
    guide = Guide(model)
    previous_posterior.start_at(guide, {B: torch.zeros_like(mean)}, {B: start * stddev})
    conditioned = Temper(beta)(poutine.condition(model, data={A: a}))
    blocked = Temper(beta)(poutine.block(guide, hide=[A]))
    elbo, adam = TraceMeanField_ELBO(), torch.optim.Adam([guide.means[B]], lr=0.05)
    with pyro.validation_enabled(False):
        for step in range(400):
            guide.zero_grad()
            elbo.differentiable_loss(conditioned, blocked, x, y).backward()
            adam.step()
            natural_step([guide.rhos[B]], beta, step)
    ratio = guide.stddev()[B] / stddev
    assert (ratio.square().mean(1).sqrt() - 1).abs().max() < 0.05
    assert (ratio - 1).square().mean().sqrt() < 0.1


def exact_fit(guide, prior, site, expected_nll):
    """The optimum of E[-log p(y | B)] + KL(q || p), both in closed form, for one site."""

    def loss():
        q = guide.distribution(site)
        return expected_nll(q.mean, q.variance) + kl_divergence(q, prior(site)).sum()

    minimise([guide.means[site.name], guide.rhos[site.name]], loss)


@pytest.mark.parametrize("inflation", [1.0, 2.0, 1e4])
def test_the_posterior_of_one_half_as_prior_of_the_other_gives_that_of_both(problem, inflation):
    """Inflated it counts inflation² times less; beyond all measure the other half stands alone."""
    model, a, x, y = problem
    site = model.groups[0].B
    z = torch.linalg.qr(torch.randn(2, ROWS, RANK)).Q * COLUMN_NORMS.flip(0)[:, None, :]
    more_x, more_y = observations(model, a, SCALE * torch.randn(2, OUT, RANK), z)
    base = torch.stack([layer(more_x[i]) for i, layer in enumerate(model.net.values())])
    first = known_posterior(model, a, x, y, 1.0)

    def expected_nll(mean, variance):
        error = (more_y - base - S * z @ mean.mT).square().sum()
        return (error + S**2 * (z.square() @ variance.mT).sum()) / (2 * NOISE**2)

    tensors = dict(zip((f"{B}.mean", f"{B}.stddev"), first, strict=True))
    prior = previous_posterior.Prior(model.groups, tensors, inflation)
    guide = Guide(model)
    previous_posterior.start_at(guide, {B: first[0]}, {B: first[1]})
    exact_fit(guide, prior, site, expected_nll)

    alone = S * (more_y - base).mT @ z / NOISE**2  # precision times mean, and precision
    precision = S**2 * z.square().sum(1, keepdim=True) / NOISE**2
    carried = 1 / (inflation * first[1]) ** 2
    stddev = (carried + precision) ** -0.5
    mean = (carried * first[0] + alone) * stddev**2
    torch.testing.assert_close(guide.mean()[B], mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(guide.stddev()[B], stddev, rtol=1e-2, atol=0)
    if inflation == 1:
        both = torch.cat([x, more_x], 1), torch.cat([y, more_y], 1)
        for found, one in zip((mean, stddev), known_posterior(model, a, *both, 1.0), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)
    if inflation == 1e4:
        torch.testing.assert_close(mean, alone / precision, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stddev, precision.expand_as(mean) ** -0.5, rtol=1e-4, atol=0)


# ---- A and B both open, against NUTS


@pytest.fixture(scope="module")
def one_layer():
    """One layer of 3 x 2 and rank 1, x (1, rows, 2), y (1, rows, 3), and draws of A and B by NUTS.

    A and B are known only together, B A = (c B) (A / c): a ridge, and its mirror image at -A, -B,
    where the chain does not go.
    """
    pyro.set_rng_seed(0)
    model = Linear(nn.ModuleDict({"only": nn.Linear(2, 3)}), Prior(SCALE), rank=1)
    a, b = torch.tensor([[[0.4, -0.3]]]), torch.tensor([[[0.6], [-0.3], [0.2]]])
    x = torch.randn(1, ROWS, 2)
    y = model.net["only"](x) + ALPHA * x @ (b @ a).mT + NOISE * torch.randn(1, ROWS, 3)
    names = [site.name for site in model.sites]
    near = init_to_value(values=dict(zip(names, (a, b), strict=True)))
    kernel = NUTS(model, init_strategy=near, max_tree_depth=4, target_accept_prob=0.7)
    with pyro.validation_enabled(False):
        chain = MCMC(kernel, num_samples=250, warmup_steps=80, disable_progbar=True)
        chain.run(x, y.detach())
    return model, x, y.detach(), [chain.get_samples()[name][:, 0] for name in names]


def fitted_draws(guide, model, x, y):
    """600 draws of A and of B, the only layer's, after 400 steps of Adam."""
    guide(x, y)  # Pyro's own makes its parameters here
    adam, elbo = torch.optim.Adam(guide.parameters(), lr=0.05), TraceMeanField_ELBO(2)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, total_iters=400)
    with pyro.validation_enabled(False):
        for _ in range(400):
            adam.zero_grad()
            elbo.differentiable_loss(model, guide, x, y).backward()
            adam.step()
            falling.step()
        with torch.no_grad():
            draws = [guide(x, y) for _ in range(600)]
    return [torch.stack([one[site.name][0] for one in draws]) for site in model.sites]


def update_moments(a, b):
    """Mean and deviation of every element of ΔW."""
    update = (ALPHA * b @ a).flatten(1)
    return update.mean(0), update.std(0)


@pytest.mark.parametrize(
    ("family", "of_update", "of_factors"),
    [(normal, (0.35, 0.8), (0.3, 0.7)), (auto_lowrank, (0.65, 1.2), (0.6, 1.1))],
)
def test_a_guide_has_the_moments_of_nuts_as_far_as_its_family_can(
    one_layer, family, of_update, of_factors
):
    """ΔW, which the data know, has the mean; deviations of a mean-field guide are too small.

    Bounds are of the least ratio of deviations, the guide's over those of NUTS, among the elements
    of ΔW and among those of A and B. On the ridge a mean-field guide is as wide as the ridge is
    across; a low-rank one lies along it. They leave room for the chain, whose draws are few, and
    others where a processor rounds otherwise.
    """
    model, x, y, reference = one_layer
    pyro.set_rng_seed(0)
    found = fitted_draws(family.Guide(model), model, x, y)
    (mean, stddev), (own_mean, own_stddev) = update_moments(*reference), update_moments(*found)
    assert ((own_mean - mean) / stddev).abs().max() < 0.4
    assert mean.abs().max() > 4 * stddev.min()  # it is no prior that both have found
    ratios = own_stddev / stddev
    factors = [q.std(0) / p.std(0) for q, p in zip(found, reference, strict=True)]
    assert of_update[0] < ratios.min() < of_update[1]
    assert of_factors[0] < min(one.min() for one in factors) < of_factors[1]
    assert max(ratios.max(), *(one.max() for one in factors)) < 1.5
