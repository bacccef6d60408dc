"""The generative side: the Pyro program, effect handlers for it, and the base models."""

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
