"""The generative side: the Pyro program, effect handlers for it, and the base models.

- `whisper`: the program, on one screen; `pooling`: the same over several domains;
- `likelihood`: how Whisper scores a batch; `encoder`: its encoder in two parts;
- `tempering`: beta; `estimators`: how the noise of a draw reaches the tokens of a batch;
- `base`, `folders`: a Whisper with its tokenizer and features, and its files;
- `decoding`: a window of audio to tokens; `logits`: what is done with each row's;
- `second_moments`: what a base's layers hear, for priors and strengths that are made of it.
"""

from blora_pyro.models.base import (
    DTYPES,
    Base,
    base_of,
    check_device,
    check_dtype,
    load_base,
    map_languages,
    on_this_machine,
    resolve_device,
)
from blora_pyro.models.estimators import (
    ESTIMATORS,
    Flipout,
    LocalReparameterization,
    Shared,
    build_estimator,
)
from blora_pyro.models.folders import adapter_in, find_folder
from blora_pyro.models.likelihood import Likelihood, Prediction, WhisperLikelihood
from blora_pyro.models.pooling import PooledBLoRA, Pooling, pooling_of
from blora_pyro.models.tempering import Temper
from blora_pyro.models.whisper import BLoRA, Density, FactorPrior, WhisperProgram

__all__ = [
    "DTYPES",
    "ESTIMATORS",
    "BLoRA",
    "Base",
    "Density",
    "FactorPrior",
    "Flipout",
    "Likelihood",
    "LocalReparameterization",
    "PooledBLoRA",
    "Pooling",
    "Prediction",
    "Shared",
    "Temper",
    "WhisperLikelihood",
    "WhisperProgram",
    "adapter_in",
    "base_of",
    "build_estimator",
    "check_device",
    "check_dtype",
    "find_folder",
    "load_base",
    "map_languages",
    "on_this_machine",
    "pooling_of",
    "resolve_device",
]
