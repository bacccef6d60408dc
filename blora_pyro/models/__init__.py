"""The generative side: the Pyro program, effect handlers for it, and the base models."""

from blora_pyro.models.base import POCKET, Base, check_device, load_base
from blora_pyro.models.estimators import (
    ESTIMATORS,
    Flipout,
    LocalReparameterization,
    Shared,
    build_estimator,
)
from blora_pyro.models.tempering import Temper
from blora_pyro.models.whisper import BLoRA, FactorPrior, Prior

__all__ = [
    "ESTIMATORS",
    "POCKET",
    "BLoRA",
    "Base",
    "FactorPrior",
    "Flipout",
    "LocalReparameterization",
    "Prior",
    "Shared",
    "Temper",
    "build_estimator",
    "check_device",
    "load_base",
]
