"""`normal`: independent Gaussian prior, and a mean-field Gaussian guide."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from blora_pyro.adapters import Site
from blora_pyro.errors import check_positive
from blora_pyro.models import FactorPrior

RHO_RANGE = (-5.5, -4.5)  # softplus: 0.004 to 0.011

EXPLANATION = (
    "A Normal prior pulls every weight towards 0 in proportion to its size, in every rank and "
    "layer alike: it makes updates small and switches nothing off."
)


class Prior:
    """p(w) = N(w; 0, scale²) for every element of A and B (arXiv 2510.18723)."""

    def __init__(self, scale: float = 0.05) -> None:
        """A Normal around 0.

        Args:
            scale: Standard deviation, in units of the weights.
        """
        check_positive(scale=scale)
        self.scale = scale

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns)."""
        return dist.Normal(0.0, self.scale).expand(site.shape).to_event(2)


def initial_mean(site: Site) -> nn.Parameter:
    """A ~ U(±1/sqrt(in_features)) (Kaiming-uniform, as LoRA starts) and B = 0; of `site.shape`.

    So the mean of the adapted model is the base model.
    """
    if site.factor == "B":
        return nn.Parameter(torch.zeros(site.shape))
    bound = site.shape[-1] ** -0.5
    return nn.Parameter(torch.empty(site.shape).uniform_(-bound, bound))


def initial_rho(site: Site) -> nn.Parameter:
    """Rho ~ U(-5.5, -4.5) where sigma = softplus(rho) (arXiv 2510.18723); of `site.shape`."""
    return nn.Parameter(torch.empty(site.shape).uniform_(*RHO_RANGE))


class Guide(nn.Module):
    """q(w) = N(w; mean, softplus(rho)²) for every element, one plain Normal site a stacked factor.

    KL(q || p) against a Normal prior is closed-form (Kingma, Welling, arXiv 1312.6114, app. B):
    the sum of log(scale / sigma) + (sigma² + mean²) / (2 scale²) - 1/2. It starts from
    `initial_mean` and `initial_rho`.
    """

    def __init__(self, model: FactorPrior) -> None:
        """Parameters of shape `site.shape` for every site of `model`."""
        super().__init__()
        self.groups = model.groups
        sites = model.sites
        self.means = nn.ParameterDict({site.name: initial_mean(site) for site in sites})
        self.rhos = nn.ParameterDict({site.name: initial_rho(site) for site in sites})

    def distribution(self, site: Site) -> dist.Distribution:
        """Q of a site: batch shape (modules,), event shape (rows, columns)."""
        sigma = softplus(self.rhos[site.name])
        return dist.Normal(self.means[site.name], sigma, validate_args=False).to_event(2)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every site; takes the model's arguments, returns site name -> draw."""
        pyro.module("guide", self)
        draws = {}
        for group in self.groups:
            distributions = {site.name: self.distribution(site) for site in group.sites}
            with group.plate():
                for name, q in distributions.items():
                    draws[name] = pyro.sample(name, q)
        return draws

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site."""
        return {name: mean.detach() for name, mean in self.means.items()}

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site."""
        return {name: softplus(rho.detach()) for name, rho in self.rhos.items()}
