"""Families and guides by name, or by the path of a user's own file."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from blora_pyro.errors import UserError
from blora_pyro.models import BLoRA, Prior

FAMILIES = {"normal": "blora_pyro.guides.normal"}
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


def build_prior(name: str, **arguments: float) -> Prior:
    """The prior of a family with its arguments, such as `scale=0.05`.

    Raises:
        UserError: If the family is unknown or takes no such argument.
    """
    prior = _member(load_family(name), "Prior", name)
    allowed = list(inspect.signature(prior).parameters)
    unknown = [key for key in arguments if key not in allowed]
    if unknown:
        raise UserError(f"prior {name} takes no '{unknown[0]}'; it takes {', '.join(allowed)}")
    try:
        inspect.signature(prior).bind(**arguments)
    except TypeError as error:
        raise UserError(f"prior {name}: {error}; give the argument a default in the file") from None
    return prior(**arguments)


def build_guide(name: str, model: BLoRA) -> Guide:
    """The guide `name` (a family's, `point`, `auto-normal`, or a file's) for `model`.

    Raises:
        UserError: If there is no such guide.
    """
    return _member(load_family(name, GUIDES), "Guide", name)(model)
