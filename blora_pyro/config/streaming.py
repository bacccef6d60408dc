"""Which options of a fit go together with a stream of training data."""

from typing import TYPE_CHECKING

from blora_pyro.errors import UserError

if TYPE_CHECKING:
    from blora_pyro.config.fit_config import FitConfig


def check_streaming(config: "FitConfig") -> None:
    """Refuse what needs all training data, or their number, before the first step.

    Raises:
        UserError: Naming the option, and what to do.
    """
    if not config.streaming:
        if config.shuffle_buffer is not None:
            raise UserError(
                f"shuffle_buffer is {config.shuffle_buffer}, but no streaming; give both"
            )
        return
    if (count := len(config.sources)) > 1:
        raise UserError(f"data is {count} sources, and streaming takes one; give one")
    possible = {
        "beta": (not isinstance(config.beta, str), "give a number"),
        "epochs": (config.epochs is None, "give steps"),
        "data_weights": (config.data_weights is None, "leave it out"),
        "max_utterances": (config.max_utterances is None, "leave it out"),
        "distillation": (not config.distillation, "leave it out"),
        "cache_encoder": (not config.cache_encoder, "leave it out"),
    }
    for name, (is_possible, instead) in possible.items():
        if not is_possible:
            raise UserError(
                f"{name} is {getattr(config, name)}, which streaming can't take; {instead}, or "
                "fit without streaming"
            )
