"""Families and guides by name, or by the path of a user's own file."""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Site
from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES, GUIDES, PREVIOUS_POSTERIOR, code_path
from blora_pyro.guides import previous_posterior
from blora_pyro.guides.contracts import Guide, PreparedPrior, Prior
from blora_pyro.models import FactorPrior
from blora_pyro.options import FitConfig


class _Source(SourceFileLoader):
    """Runs the text of a file: bytecode beside it may be of another, and is not looked at."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_family(name: str, known: dict[str, str] = FAMILIES) -> ModuleType:
    """Return the module of a family, by name or by the path of a `.py` file (whose code is run).

    Raises:
        UserError: If there is no such name or file, or the file fails.
    """
    if name in known:
        return importlib.import_module(known[name])
    if code_path(name) is None:
        raise UserError(f"'{name}' is none of {', '.join(known)}, nor the path of a .py file")
    path = Path(name).absolute()
    own = f"blora_pyro_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(own, path, loader=_Source(own, str(path)))
    assert spec is not None and spec.loader is not None  # it was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        with users_code(name, "import"):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[spec.name]
        raise
    return module


@contextmanager
def users_code(name: str, doing: str) -> Iterator[None]:
    """Turn an exception in a user's file into a UserError that names file and line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(name).name]
        where = f", line {lines[-1]}" if lines else ""
        kind = type(error).__name__
        raise UserError(f"{name} fails on {doing}{where}: {kind}: {error}") from error


def _member(module: ModuleType, member: str, name: str) -> Any:
    try:
        return getattr(module, member)
    except AttributeError:
        raise UserError(f"{name} has no class {member}; see blora_pyro/guides/normal.py") from None


def prior_arguments(name: str, /, **given: Any) -> dict[str, Any]:
    """Return all arguments of a family's prior: those given, such as `scale=0.05`, and defaults.

    Texts, as from the command line, become numbers unless the annotation is `str`.

    Raises:
        UserError: If the family is unknown, takes no such argument, or not that value.
    """
    prior = _member(load_family(name), "Prior", name)
    parameters = {
        key: one
        for key, one in inspect.signature(prior).parameters.items()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    for key, value in given.items():
        if key not in parameters:
            takes = ", ".join(parameters) or "no arguments"
            raise UserError(f"prior {name} takes no '{key}'; it takes {takes}")
        if value is None:
            raise UserError(f"prior {name}: {key} is None; give a value, or leave it out")
        if isinstance(value, str):
            annotation = parameters[key].annotation  # a string if the file postpones evaluation
            kind = {"int": int, "str": str}.get(getattr(annotation, "__name__", annotation), float)
            try:
                given[key] = kind(value)
            except ValueError:
                raise UserError(f"prior {name}: {key} is '{value}'; give a number") from None
    for key, one in parameters.items():
        if one.default is one.empty and key not in given:
            raise UserError(f"prior {name} needs '{key}'; give it, or a default in the file")
    arguments = {key: one.default for key, one in parameters.items()} | given
    with users_code(name, "Prior(...)"):
        prior(**arguments)  # refuses bad values
    return arguments


def build_prior(name: str, /, **arguments: Any) -> Prior:
    """Return the prior of a family; arguments and errors are those of `prior_arguments`."""
    arguments = prior_arguments(name, **arguments)
    return _member(load_family(name), "Prior", name)(**arguments)


def with_prior_arguments(config: FitConfig) -> FitConfig:
    """Return a configuration with every argument of the prior in it, and the guide's name.

    Loads the family: a user's own file is run here. Raises UserError as `prior_arguments` does.
    """
    if config.prior_from is not None:
        inflation = {"inflation": config.prior_inflation or 1.0}
        return replace(config, prior=PREVIOUS_POSTERIOR, prior_args=inflation, guide="normal")
    given = dict(config.prior_args)
    if config.prior_scale is not None:
        given["scale"] = config.prior_scale
    arguments = prior_arguments(config.prior, **given)
    if "languages" in arguments and "languages" not in given and config.taught_languages:
        arguments["languages"] = ",".join(config.taught_languages)
    return replace(config, prior_args=arguments, guide=config.guide or config.prior)


def prepare_prior(
    prior: object,
    base: WhisperForConditionalGeneration,
    batches: Iterable[Batch],
    modules: Iterable[str] = (),
) -> None:
    """Run the `prepare` of a `PreparedPrior` and store its result; leave any other prior alone.

    `modules` are the names of the adapted layers.

    Raises:
        UserError: If it fails or returns something else than tensors by name.
    """
    if not isinstance(prior, PreparedPrior):
        return
    name = _name_of(prior)
    if hasattr(prior, "modules"):
        prior.modules = tuple(modules)
    with users_code(name, "prepare(base, batches)"):
        tensors: object = prior.prepare(base, batches)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"prior {name}: prepare() gives {tensors!r:.60}; give a dict of tensors")
    prior.tensors = {key: value.detach().to(base.device) for key, value in tensors.items()}


@dataclass(frozen=True)
class Argument:
    """An argument of a prior family, as in `--prior-arg name=value`; described by its docstring."""

    name: str
    default: Any
    description: str


def describe_prior(name: str) -> tuple[str, tuple[Argument, ...]]:
    """Return a family's description in one line, and the arguments that its prior takes.

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
    """Return the guide `name` (a family's, `point`, `auto-normal`, or a file's) for `model`.

    Raises:
        UserError: If there is no such guide, it fails, or it does not sample just what the prior
            samples.
    """
    with users_code(name, "Guide(model)"):
        guide = _member(load_family(name, GUIDES), "Guide", name)(model)
    if isinstance(guide, AutoGuide):  # covers all by construction, and needs the model's arguments
        return guide
    if lacking := [one for one in ("mean", "stddev") if not hasattr(guide, one)]:
        raise UserError(f"guide {name} has no method {lacking[0]}(); see docs/your_own_prior.md")
    density = _name_of(model.prior)
    device = model.device  # where a prepared prior has its tensors
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng(devices):
        with users_code(density, "Prior(...)(site)"):
            with device:
                for site in model.sites:
                    check_shapes(model.prior(site), site, density)
            prior = FactorPrior(model.groups, model.prior, device)
            wanted = latent_sites(poutine.trace(prior).get_trace()).keys()
        with users_code(name, "guide()"):
            covered = latent_sites(poutine.trace(guide).get_trace()).keys()
    if wanted != covered:
        odd = ", ".join(sorted(wanted ^ covered))
        raise UserError(
            f"guide {name} does not fit prior {density}: only one of them samples {odd}; give the "
            "family's own guide, or auto-normal"
        )
    return guide


def check_shapes(found: dist.Distribution, site: Site, name: str) -> None:
    """Raise UserError if the distribution that prior `name` gives for a site has other shapes."""
    shapes = tuple(found.batch_shape), tuple(found.event_shape)
    if shapes != (site.shape[:1], site.shape[1:]):
        raise UserError(
            f"prior {name} gives batch shape {shapes[0]} and event shape {shapes[1]} for "
            f"{site.name}; give {site.shape[:1]} and {site.shape[1:]}, by "
            ".expand(site.shape).to_event(2)"
        )


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Return name -> message of every latent site, without plates and auxiliary sites of Pyro."""
    return {
        name: site
        for name, site in trace.iter_stochastic_nodes()
        if not site_is_subsample(site) and not site["infer"].get("is_auxiliary")
    }


def _name_of(prior: object) -> str:
    """Return a built-in family's name, or the path of a user's file."""
    if isinstance(prior, previous_posterior.Prior):
        return PREVIOUS_POSTERIOR
    home = type(prior).__module__
    names = [name for name, module in FAMILIES.items() if home == module]
    return names[0] if names else getattr(sys.modules.get(home), "__file__", None) or home
