"""Gradient checkpointing of a Whisper that is not in training mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import WhisperForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

DROPOUTS = ("dropout", "activation_dropout")


def enable_checkpointing(net: WhisperForConditionalGeneration) -> None:
    """Have transformers checkpoint every layer, where it is asked to by `checkpointed`."""
    # The second name is that of earlier releases of transformers.
    switch = getattr(net, "activation_checkpointing_enable", None)
    (switch or net.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def checkpointed(net: WhisperForConditionalGeneration) -> Iterator[None]:
    """A forward pass in here keeps only the inputs of each layer (Chen et al., arXiv 1604.06174).

    The rest is computed again in the backward pass, with the same random numbers; factors must stay
    in place until then. transformers checkpoints a layer only while that is in training mode: so it
    is in here, without its dropout. Its parts and all else stay in eval mode.
    """
    layers = [one for one in net.modules() if isinstance(one, GradientCheckpointingLayer)]
    before = [(one, name, getattr(one, name)) for one in layers for name in ("training", *DROPOUTS)]
    before.append((net.config, "use_cache", net.config.use_cache))  # where the encoder has it from
    try:
        net.config.use_cache = False
        for layer in layers:
            layer.training = True
            for name in DROPOUTS:
                setattr(layer, name, 0.0)
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)
