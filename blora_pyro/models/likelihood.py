"""The likelihood of a batch's tokens: a frozen Whisper that runs with the factors in place.

The encoder in two parts, autocast, gradient checkpointing and the regulariser of distillation are
hidden here; `models.whisper` sees a `Likelihood`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import WhisperForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro.data import Batch, SoftTargets
from blora_pyro.errors import UserError
from blora_pyro.models.encoder import embed, first_adapted, run_layers

_DROPOUTS = ("dropout", "activation_dropout")


class Prediction(NamedTuple):
    """The result of a likelihood for a batch.

    Attributes:
        logits: (batch, tokens, vocabulary), float32, of the token after each decoder input.
        penalties: Name -> scalar in nats, added to the loss as it is.
    """

    logits: Tensor
    penalties: Mapping[str, Tensor]


class Likelihood(Protocol):
    """p(tokens | audio, factors): called with a batch while the factors are in place.

    It samples nothing and keeps no state from one batch to the next.
    """

    net: WhisperForConditionalGeneration

    def __call__(self, batch: Batch) -> Prediction:
        """Logits of every position, and the regularising terms of this batch."""


class WhisperLikelihood:
    """`Likelihood` of a Whisper.

    Whisper may have weights in bfloat16 or float16; its activations and the factors' two products
    then have that dtype, too, and the logits are float32.

    Attributes:
        net: The Whisper, in eval mode.
        autocast: Dtype that its products are cast to, or None.
        first_adapted: Number of the encoder's first adapted layer; earlier layers see no factor.
    """

    def __init__(
        self,
        net: WhisperForConditionalGeneration,
        modules: Iterable[str] | None = None,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Put the net into eval mode; which of its parameters are trained is left as it is.

        Args:
            net: A Whisper.
            modules: Names of the adapted layers; None if any layer may change during the fit.
            autocast: Run Whisper under autocast to this dtype.
            gradient_checkpointing: Keep no activations inside Whisper's layers, and compute them
                again in the backward pass: less memory for about a third more time.

        Raises:
            UserError: If `autocast` is not float32's and not the net's own half precision.
        """
        if autocast is not None and net.dtype not in (torch.float32, autocast):
            kinds = [str(kind).removeprefix("torch.") for kind in (net.dtype, autocast)]
            raise UserError(
                f"the base's weights are {kinds[0]}, and precision asks for {kinds[1]}; give "
                "precision fp32 with a half-precision base: it computes in its own anyway"
            )
        self.net = net.eval()
        self.autocast = autocast
        self.first_adapted = 0 if modules is None else first_adapted(net, modules)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:  # of every layer in training mode, see `checkpointed`
            # The second name is that of earlier releases of transformers.
            enable = getattr(net, "activation_checkpointing_enable", None)
            (enable or net.gradient_checkpointing_enable)({"use_reentrant": False})

    def __call__(self, batch: Batch) -> Prediction:
        """Logits, and with soft targets `distillation`, their weight times the mean KL."""
        layers = checkpointed(self.net) if self.gradient_checkpointing else nullcontext()
        with self._autocasting(), layers:
            states = self._encode(batch)
            logits = self._decode(states, batch.decoder_input_ids)
            if batch.soft is None:
                return Prediction(logits, {})
            divergence = self._divergence(states, batch.soft)
        return Prediction(logits, {"distillation": batch.soft.weight * divergence})

    def frozen_states(self, features: Tensor) -> Tensor:
        """Return the encoder's states before its first adapted layer, which no factor changes.

        From features (batch, mels, frames), see `embed`, to (batch, frames / 2, width).
        """
        with self._autocasting():
            layers = self.net.model.encoder.layers[: self.first_adapted]
            return run_layers(layers, embed(self.net, features))

    def _autocasting(self) -> torch.autocast:
        kind, dtype = self.net.device.type, self.autocast
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)

    def _encode(self, batch: Batch) -> BaseModelOutput:
        """The encoder's last states, (batch, positions, width)."""
        states, encoder = batch.encoder_states, self.net.model.encoder
        if states is None:
            states = self.frozen_states(batch.input_features)
        states = run_layers(encoder.layers[self.first_adapted :], states)
        return BaseModelOutput(last_hidden_state=encoder.layer_norm(states))

    def _decode(self, states: BaseModelOutput, tokens: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of every next token, in float32."""
        return self.net(
            encoder_outputs=states, decoder_input_ids=tokens, use_cache=False
        ).logits.float()

    def _divergence(self, states: BaseModelOutput, soft: SoftTargets) -> Tensor:
        """KL(teacher || adapted), the mean over the target positions, nats."""
        log_probs = self._decode(states, soft.decoder_input_ids)[soft.is_target].log_softmax(-1)
        teacher = soft.log_probs[soft.is_target].float()
        return kl_div(log_probs, teacher, log_target=True, reduction="sum") / len(teacher)


@contextmanager
def checkpointed(net: WhisperForConditionalGeneration) -> Iterator[None]:
    """Inside a `with`, keep only the inputs of each layer (Chen et al., arXiv 1604.06174).

    The rest is computed again in the backward pass, with the same random numbers; factors must stay
    in place until then. transformers checkpoints a layer only in training mode, so layers are in
    training mode meanwhile, with their dropout at 0. Everything inside them stays in eval mode.
    """
    layers = [one for one in net.modules() if isinstance(one, GradientCheckpointingLayer)]
    before = [
        (one, name, getattr(one, name)) for one in layers for name in ("training", *_DROPOUTS)
    ]
    before.append((net.config, "use_cache", net.config.use_cache))  # the encoder reads it there
    try:
        net.config.use_cache = False
        for layer in layers:
            layer.training = True
            for name in _DROPOUTS:
                setattr(layer, name, 0.0)
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)
