"""The generative side: the Pyro program, effect handlers for it, and the base models.

- `whisper`: the program, on one screen; `pooling`: several domains in one;
- `tempering`: beta; `estimators`: how noise reaches the tokens of a step;
- `base`, `folders`: a Whisper with all that belongs to it, and its files;
- `encoder`: in two parts, and on shorter windows; `decoding`: a window to tokens;
- `gradient_checkpointing`: less memory.
"""

from blora_pyro.models.base import DTYPES, POCKET, Base, check_device, check_dtype, load_base
from blora_pyro.models.estimators import (
    ESTIMATORS,
    Flipout,
    LocalReparameterization,
    Shared,
    build_estimator,
)
from blora_pyro.models.folders import adapter_in, find_folder
from blora_pyro.models.pooling import POOLINGS, PooledBLoRA, Pooling
from blora_pyro.models.tempering import Temper
from blora_pyro.models.whisper import BLoRA, FactorPrior, Prior

__all__ = [
    "DTYPES",
    "ESTIMATORS",
    "POCKET",
    "POOLINGS",
    "BLoRA",
    "Base",
    "FactorPrior",
    "Flipout",
    "LocalReparameterization",
    "PooledBLoRA",
    "Pooling",
    "Prior",
    "Shared",
    "Temper",
    "adapter_in",
    "build_estimator",
    "check_device",
    "check_dtype",
    "find_folder",
    "load_base",
]
