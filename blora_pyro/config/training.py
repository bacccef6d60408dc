"""Which options of a fit its loop can take, one by one and together."""

import math
from typing import TYPE_CHECKING

from blora_pyro.errors import UserError, check_positive
from blora_pyro.fitting.schedules import SCHEDULES

if TYPE_CHECKING:
    from blora_pyro.config.fit_config import FitConfig

COUNTS = (
    "max_utterances",
    "shuffle_buffer",
    "rank",
    "steps",
    "batch_size",
    "gradient_accumulation",
    "eval_every",
    "patience",
)

POSITIVE = ("alpha", "prior_scale", "pooling_scale", "lr", "epochs", "max_grad_norm")

PRECISIONS = ("fp32", "bf16")

# A cold posterior (Wenzel et al., arXiv 2002.02405): of the temperatures tried on the pocket dev
# sets the one of lowest new-domain and backward error, see benchmarks/forgetting.md.
AUTO_TEMPERATURE = 0.03
TEMPERATURES = {"auto": AUTO_TEMPERATURE, "elbo": 1.0}  # beta = T / N


def check_training(config: "FitConfig") -> None:
    """Refuse what the loop can't do.

    Raises:
        UserError: Naming the option, and what to do.
    """
    _check_numbers(config)
    _check_regularizers(config)
    if config.precision not in PRECISIONS:
        raise UserError(f"precision is '{config.precision}'; give {' or '.join(PRECISIONS)}")
    if config.schedule not in SCHEDULES:
        raise UserError(f"schedule is '{config.schedule}'; give one of {', '.join(SCHEDULES)}")
    if config.epochs is None:
        check_warm_up(config)
    if config.gradient_accumulation > config.batch_size:
        raise UserError(
            f"gradient_accumulation is {config.gradient_accumulation}, more than the "
            f"{config.batch_size} utterances of a step; give batch_size or less"
        )
    for name in ("spec_augment", "trim_audio"):
        if config.cache_encoder and getattr(config, name):
            raise UserError(
                f"cache_encoder and {name} are given, and with {name} the encoder hears an "
                "utterance otherwise in every batch; leave one out"
            )
    for name in ("dev", "patience"):
        if config.eval_every is None and getattr(config, name) is not None:
            raise UserError(f"{name} is given, but no eval_every; give both")


def _check_numbers(config: "FitConfig") -> None:
    check_positive(**{name: getattr(config, name) for name in (*COUNTS, *POSITIVE)})
    for name in (*COUNTS, "warmup_steps"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value == int(value)):
            raise UserError(f"{name} is {value}; give a whole number")
    if config.beta not in TEMPERATURES and (
        isinstance(config.beta, str) or not (config.beta >= 0 and math.isfinite(config.beta))
    ):
        raise UserError(f"beta is {config.beta!r}; give a number >= 0, 'auto' or 'elbo'")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}; give a whole number from 0 to 4294967295")


def _check_regularizers(config: "FitConfig") -> None:
    for name in ("distillation", "ewc"):
        value = getattr(config, name)
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; give a number >= 0")
    if config.ewc and not config.backward_sets:
        raise UserError("ewc is given, but no backward set to take Fisher from; give some")
    if config.distillation and not config.taught_languages:
        raise UserError(
            "distillation is given, and no backward set is called by a language; name the "
            "languages in distillation_languages"
        )
    if config.average_from is not None and not 0 <= config.average_from < 1:
        raise UserError(f"average_from is {config.average_from}; give a share of the steps below 1")
    if config.average_from is not None and config.eval_every is not None:
        raise UserError("average_from and eval_every both choose the posterior; give one")


def check_warm_up(config: "FitConfig") -> None:
    """Refuse a warm-up that does not fit; the steps must have been worked out.

    Raises:
        UserError: If it is longer than the fit.
    """
    if config.warmup_steps is not None and not 0 <= config.warmup_steps <= config.steps:
        raise UserError(
            f"warmup_steps is {config.warmup_steps}; give a whole number from 0 to the steps "
            f"of the fit, {config.steps}"
        )
