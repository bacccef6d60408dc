"""Families and guides by name, or by the path of a user's own file."""

import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.models import FactorPrior, Prior

FAMILIES = {
    "normal": "blora_pyro.guides.normal",
    "laplace": "blora_pyro.guides.laplace",
    "student-t": "blora_pyro.guides.student_t",
    "scale-mixture": "blora_pyro.guides.scale_mixture",
    "horseshoe": "blora_pyro.guides.horseshoe",
    "learned-scale": "blora_pyro.guides.learned_scale",
    "pretrained-scale": "blora_pyro.guides.pretrained_scale",
    "a-only": "blora_pyro.guides.a_only",
}
GUIDES = {
    **FAMILIES,
    "point": "blora_pyro.guides.point",
    "auto-normal": "blora_pyro.guides.auto_normal",
}


class Guide(Protocol):
    """What the rest of the library asks of a guide, beside being an `nn.Module`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every site of the model."""

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean: site name -> tensor of the site's shape."""

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation: site name -> tensor of the site's shape."""


def load_family(name: str, known: dict[str, str] = FAMILIES) -> ModuleType:
    """The module of a family, by name or by the path of a `.py` file (whose code is run).

    Raises:
        UserError: If there is no such name or file, or the file fails.
    """
    if name in known:
        return importlib.import_module(known[name])
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"'{name}' is none of {', '.join(known)}, nor the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"blora_pyro_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"{name} fails on import: {type(error).__name__}: {error}") from error
    return module


def _member(module: ModuleType, member: str, name: str) -> Any:
    try:
        return getattr(module, member)
    except AttributeError:
        raise UserError(f"{name} has no class {member}; see blora_pyro/guides/normal.py") from None


def prior_arguments(name: str, **given: Any) -> dict[str, Any]:
    """All arguments of a family's prior: those given, such as `scale=0.05`, and the defaults.

    Texts, as the command line has them, become numbers unless the annotation is `str`.

    Raises:
        UserError: If the family is unknown, takes no such argument, or not that value.
    """
    prior = _member(load_family(name), "Prior", name)
    parameters = inspect.signature(prior).parameters
    for key, value in given.items():
        if key not in parameters:
            raise UserError(f"prior {name} takes no '{key}'; it takes {', '.join(parameters)}")
        if isinstance(value, str):
            given[key] = _convert(name, key, value, parameters[key].annotation)
    missing = [key for key, one in parameters.items() if one.default is one.empty]
    if lacking := [key for key in missing if key not in given]:
        raise UserError(f"prior {name} needs '{lacking[0]}'; give it, or a default in the file")
    arguments = {key: one.default for key, one in parameters.items()} | given
    prior(**arguments)  # refuses bad values
    return arguments


def build_prior(name: str, **arguments: Any) -> Prior:
    """The prior of a family; see `prior_arguments`.

    Raises:
        UserError: If the family is unknown, takes no such argument, or not that value.
    """
    arguments = prior_arguments(name, **arguments)
    return _member(load_family(name), "Prior", name)(**arguments)


def _convert(name: str, key: str, text: str, annotation: Any) -> Any:
    kind = {"int": int, "str": str}.get(getattr(annotation, "__name__", annotation), float)
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"prior {name}: {key} is '{text}'; give a number") from None


@dataclass(frozen=True)
class Argument:
    """An argument of a prior family.

    Attributes:
        name: As in `--prior-arg name=value`.
        default: What it is if not given.
        description: From the docstring.
    """

    name: str
    default: Any
    description: str


def describe_prior(name: str) -> tuple[str, tuple[Argument, ...]]:
    """What a family is, in one line, and the arguments that its prior takes.

    Raises:
        UserError: If there is no such family.
    """
    module = load_family(name)
    prior = _member(module, "Prior", name)
    summary = (inspect.getdoc(module) or name).splitlines()[0].partition(": ")
    text = inspect.getdoc(prior.__init__) or ""
    arguments = []
    for key, parameter in inspect.signature(prior).parameters.items():
        found = re.search(rf"^\s+{key}: (.*(?:\n\s{{8,}}\S.*)*)", text, flags=re.MULTILINE)
        description = " ".join(found.group(1).split()) if found else ""
        arguments.append(Argument(key, parameter.default, description))
    return summary[2] or summary[0], tuple(arguments)


def build_guide(name: str, model: FactorPrior) -> Guide:
    """The guide `name` (a family's, `point`, `auto-normal`, or a file's) for `model`.

    Raises:
        UserError: If there is no such guide, or it does not sample just what the prior samples.
    """
    guide = _member(load_family(name, GUIDES), "Guide", name)(model)
    if isinstance(guide, AutoGuide):  # covers all by construction, and needs the model's arguments
        return guide
    prior = FactorPrior(model.groups, model.prior, torch.device("cpu"))
    with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        wanted, covered = (
            latent_sites(poutine.trace(program).get_trace()).keys() for program in (prior, guide)
        )
    if wanted != covered:
        odd = ", ".join(sorted(wanted ^ covered))
        raise UserError(
            f"guide {name} does not fit prior {_name_of(model.prior)}: only one of them samples "
            f"{odd}; give the family's own guide, or auto-normal"
        )
    return guide


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Name -> message of every latent site of a trace: no plates, no helpers of Pyro's guides."""
    return {
        name: site
        for name, site in trace.iter_stochastic_nodes()
        if not site_is_subsample(site) and not site["infer"].get("is_auxiliary")
    }


def _name_of(prior: Prior) -> str:
    module = type(prior).__module__
    return next((name for name, home in FAMILIES.items() if home == module), module)
