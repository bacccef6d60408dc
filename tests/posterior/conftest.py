import pyro
import torch
import xarray
from torch import nn

from blora_pyro.adapters import Group
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior
from blora_pyro.posterior import Family, Posterior

ENCODER = ("encoder.0.q_proj", "encoder.0.v_proj", "decoder.0.q_proj")
TALL = ("encoder.0.fc1", "decoder.0.fc1")
GROUPS = (
    Group(ENCODER, out_features=4, in_features=4, rank=2, weight_stddevs=(0.1, 0.2, 0.3)),
    Group(TALL, out_features=6, in_features=4, rank=2, weight_stddevs=(0.4, 0.5)),
)
FACTORS = ("A_4x4", "B_4x4", "A_6x4", "B_6x4")


def fitted(prior="normal", guide=None, groups=GROUPS, **arguments) -> Posterior:
    """A posterior of the family whose parameters are away from their start."""
    program = FactorPrior(groups, build_prior(prior, **arguments), torch.device("cpu"))
    built = build_guide(guide or prior, program)
    assert isinstance(built, nn.Module)
    built()  # Pyro's own make their parameters here
    pyro.clear_param_store()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    family = Family(prior, arguments, guide or prior)
    state = {name: value.detach() for name, value in built.state_dict().items()}
    return Posterior("made", groups, 4.0, built.mean(), built.stddev(), family, state)


def group_of(data, name: str) -> xarray.Dataset:
    """A group, of an InferenceData or of a DataTree."""
    found = data[name]
    return found if isinstance(found, xarray.Dataset) else found.to_dataset()
