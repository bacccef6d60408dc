"""BLoRA as a probabilistic program: adapt Whisper without losing what it already knew.

`fit` is the whole way from a base model to a run folder, `Posterior` what it found; `BLoRA` and
`Temper` are the parts for those who write their own loop in Pyro.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "BLoRA",
    "FitConfig",
    "Posterior",
    "Run",
    "Temper",
    "__version__",
    "at_strength",
    "combine",
    "evaluate_run",
    "fit",
    "keep_adapter",
    "load_base",
    "load_examples",
    "merge_run",
    "prune",
    "read_run",
    "transcribe",
    "write_report",
]

if TYPE_CHECKING:
    from blora_pyro.models import BLoRA, Temper, load_base
    from blora_pyro.options import FitConfig
    from blora_pyro.posterior import Posterior
    from blora_pyro.posterior.combining import combine
    from blora_pyro.posterior.pruning import prune
    from blora_pyro.posterior.strength import at_strength
    from blora_pyro.runs.engines import transcribe
    from blora_pyro.runs.finished import evaluate_run, merge_run
    from blora_pyro.runs.fits import Run, fit
    from blora_pyro.runs.folders import read_run
    from blora_pyro.runs.keeping import keep_adapter
    from blora_pyro.runs.loading import load_examples
    from blora_pyro.runs.report_page import write_report

_HOMES = {
    "BLoRA": "models",
    "FitConfig": "options",
    "Posterior": "posterior",
    "Run": "runs.fits",
    "Temper": "models",
    "at_strength": "posterior.strength",
    "combine": "posterior.combining",
    "evaluate_run": "runs.finished",
    "fit": "runs.fits",
    "keep_adapter": "runs.keeping",
    "load_base": "models",
    "load_examples": "runs.loading",
    "merge_run": "runs.finished",
    "prune": "posterior.pruning",
    "read_run": "runs.folders",
    "transcribe": "runs.engines",
    "write_report": "runs.report_page",
}


def __getattr__(name: str) -> Any:  # torch and transformers load when first used, not for --help
    if name not in _HOMES:
        raise AttributeError(f"module 'blora_pyro' has no attribute '{name}'")
    return getattr(importlib.import_module(f"blora_pyro.{_HOMES[name]}"), name)
