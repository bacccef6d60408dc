"""Whisper's encoder in two parts, on windows of any length up to its own.

transformers runs it as a whole, and on full windows alone; the states are the same to the bit.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import WhisperForConditionalGeneration

_LAYERS = "model.encoder.layers."


def embed(net: WhisperForConditionalGeneration, features: Tensor) -> Tensor:
    """Return the input of the first layer, (batch, frames / 2, width).

    Args:
        net: A Whisper in eval mode.
        features: (batch, mels, frames), an even number of frames, at most those of the window.
    """
    encoder: Any = net.get_encoder()
    states = gelu(encoder.conv1(features.to(net.dtype)))
    states = gelu(encoder.conv2(states)).transpose(1, 2)
    return states + encoder.embed_positions.weight[: states.shape[1]]


def run_layers(layers: Sequence[nn.Module], states: Tensor) -> Tensor:
    """Return the output of layers of the encoder, (batch, positions, width) like their input."""
    for layer in layers:
        out = layer(states, None)
        states = out[0] if isinstance(out, tuple) else out  # as in the first releases of v5
    return states


def encode(net: WhisperForConditionalGeneration, features: Tensor) -> Tensor:
    """Return the encoder's states, (batch, frames / 2, width), of log-mels; see `embed`."""
    encoder: Any = net.get_encoder()
    return encoder.layer_norm(run_layers(encoder.layers, embed(net, features)))


def first_adapted(net: WhisperForConditionalGeneration, modules: Iterable[str]) -> int:
    """Return the index of the encoder's first layer with one of these modules in it.

    If there is none it is the number of layers. Its input does not depend on the factors.
    """
    names = (name.removeprefix(_LAYERS) for name in modules if name.startswith(_LAYERS))
    numbers = [int(name.partition(".")[0]) for name in names]
    return min(numbers, default=net.config.encoder_layers)
