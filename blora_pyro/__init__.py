"""BLoRA as a probabilistic program: adapt Whisper without losing what it already knew.

`fit` is the whole way from a base model to a run folder, `Posterior` what it found; `BLoRA` and
`Temper` are the parts for those who write their own loop in Pyro.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BLoRA", "FitConfig", "Posterior", "Run", "Temper", "__version__", "fit", "load_base"]

if TYPE_CHECKING:
    from blora_pyro.config import FitConfig
    from blora_pyro.models import BLoRA, Temper, load_base
    from blora_pyro.posterior import Posterior
    from blora_pyro.runs import Run, fit

_HOMES = {
    "BLoRA": "models",
    "FitConfig": "config",
    "Posterior": "posterior",
    "Run": "runs",
    "Temper": "models",
    "fit": "runs",
    "load_base": "models",
}


def __getattr__(name: str) -> Any:  # torch and transformers load when first used, not for --help
    if name not in _HOMES:
        raise AttributeError(f"module 'blora_pyro' has no attribute '{name}'")
    return getattr(importlib.import_module(f"blora_pyro.{_HOMES[name]}"), name)
