from dataclasses import replace

import pyro
import pytest
import torch
import xarray
from torch import nn

from blora_pyro.adapters import Group, find_targets, group_by_shape
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior
from blora_pyro.posterior import Family, Posterior

from ..conftest import inform

ENCODER = ("encoder.0.q_proj", "encoder.0.v_proj", "decoder.0.q_proj")
TALL = ("encoder.0.fc1", "decoder.0.fc1")
GROUPS = (
    Group(ENCODER, out_features=4, in_features=4, rank=2, weight_stddevs=(0.1, 0.2, 0.3)),
    Group(TALL, out_features=6, in_features=4, rank=2, weight_stddevs=(0.4, 0.5)),
)
FACTORS = ("A_4x4", "B_4x4", "A_6x4", "B_6x4")


def fitted(prior="normal", guide=None, groups=GROUPS, **arguments) -> Posterior:
    """A posterior of the family whose parameters are away from their start."""
    density = inform(build_prior(prior, **arguments), groups)
    program = FactorPrior(groups, density, torch.device("cpu"))
    built = build_guide(guide or prior, program)
    assert isinstance(built, nn.Module)
    built()  # Pyro's own make their parameters here
    pyro.clear_param_store()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    family = Family(prior, arguments, guide or prior)
    state = {name: value.detach() for name, value in built.state_dict().items()}
    posterior = Posterior("made", groups, 4.0, built.mean(), built.stddev(), family, state)
    return replace(posterior, prior_tensors=getattr(density, "tensors", {}))


def group_of(data, name: str) -> xarray.Dataset:
    """A group, of an InferenceData or of a DataTree."""
    found = data[name]
    return found if isinstance(found, xarray.Dataset) else found.to_dataset()


def posterior_of(net, target_modules="all-linear", rank=2, alpha=5.0, **shaped) -> Posterior:
    """A posterior of random moments, none of them zero; alpha / rank is no integer."""
    groups = group_by_shape(find_targets(net, target_modules), rank, **shaped)
    generator = torch.Generator().manual_seed(3)
    sites = [site for group in groups for site in group.sites]
    mean = {s.name: 0.3 * torch.randn(s.shape, generator=generator) for s in sites}
    stddev = {s.name: 0.01 + 0.1 * torch.rand(s.shape, generator=generator) for s in sites}
    return Posterior("tiny", groups, alpha, mean, stddev)


@pytest.fixture(params=["all-linear", r".*\.decoder\..*\.(q_proj|v_proj)"])
def posterior(request, net) -> Posterior:
    """Of all linear layers, and of some."""
    return posterior_of(net, request.param)


@pytest.fixture
def uneven_posterior(net) -> Posterior:
    """Layers of one to a thousandth in size, of rank 5 and without null directions."""
    groups = group_by_shape(find_targets(net, "all-linear"), 5)
    mean, stddev = {}, {}
    for site in (site for group in groups for site in group.sites):
        layers = 10.0 ** -torch.linspace(0, 3, site.shape[0])
        mean[site.name] = layers[:, None, None] * torch.randn(site.shape)
        stddev[site.name] = 0.01 + 0.1 * torch.rand(site.shape)
    return Posterior("tiny", groups, 7.5, mean, stddev)


@torch.no_grad()
def logits(net, batch) -> torch.Tensor:
    return net(
        input_features=batch.input_features,
        decoder_input_ids=batch.decoder_input_ids,
        use_cache=False,
    ).logits


def adapted(posterior, net, batch, factors=None) -> torch.Tensor:
    with posterior.applied(net, factors):
        return logits(net, batch)
