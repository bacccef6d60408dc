"""Where guides start: so that the mean of the adapted model is the base model."""

import torch
from torch import Tensor, nn

from blora_pyro.adapters import Site

RHO_RANGE = (-5.5, -4.5)  # softplus: 0.004 to 0.011


def initial_mean(site: Site) -> nn.Parameter:
    """A ~ U(±1/sqrt(in_features)) (Kaiming-uniform, as LoRA starts) and B = 0; of `site.shape`."""
    if site.factor == "B":
        return nn.Parameter(torch.zeros(site.shape))
    bound = site.shape[-1] ** -0.5
    return nn.Parameter(torch.empty(site.shape).uniform_(-bound, bound))


def initial_rho(site: Site) -> nn.Parameter:
    """Rho ~ U(-5.5, -4.5) where sigma = softplus(rho) (arXiv 2510.18723); of `site.shape`."""
    return nn.Parameter(torch.empty(site.shape).uniform_(*RHO_RANGE))


def initial_values(sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """`initial_mean` of every site by name, for Pyro's `init_to_value`."""
    return {site.name: initial_mean(site).detach() for site in sites}
