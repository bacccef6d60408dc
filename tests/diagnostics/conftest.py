from dataclasses import replace

import pyro
import torch
from torch import nn

from blora_pyro.adapters import Group
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior
from blora_pyro.posterior import Family, Posterior

from ..conftest import inform

SQUARE = ("encoder.layers.0.q_proj", "encoder.layers.0.v_proj", "decoder.layers.0.q_proj")
TALL = ("encoder.layers.0.fc1", "decoder.layers.0.fc1")
GROUPS = (
    Group(SQUARE, out_features=4, in_features=4, rank=2, weight_stddevs=(0.1, 0.2, 0.3)),
    Group(TALL, out_features=6, in_features=4, rank=2, weight_stddevs=(0.4, 0.5)),
)
ALPHA = 5.0
SCALING = ALPHA / 2


def fitted(prior="normal", guide=None, groups=GROUPS, spread=0.2, **arguments) -> Posterior:
    """A posterior of the family whose parameters are away from their start."""
    density = inform(build_prior(prior, **arguments), groups)
    program = FactorPrior(groups, density, torch.device("cpu"))
    built = build_guide(guide or prior, program)
    assert isinstance(built, nn.Module)
    built()  # Pyro's own make their parameters here
    pyro.clear_param_store()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += spread * torch.randn_like(parameter)
    family = Family(prior, arguments, guide or prior)
    state = {name: value.detach() for name, value in built.state_dict().items()}
    posterior = Posterior("made", groups, ALPHA, built.mean(), built.stddev(), family, state)
    return replace(posterior, prior_tensors=getattr(density, "tensors", {}))


def sites_of(posterior):
    return [site for group in posterior.groups for site in group.sites]


def gate_squared(draw, site, scale=0.04):
    t = draw[f"{site.name}_global"] * draw[f"{site.name}_local"]
    return t**2 / (scale**2 + t**2)
