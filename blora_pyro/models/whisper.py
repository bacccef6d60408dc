"""BLoRA as a probabilistic program: a frozen Whisper whose low-rank updates are latent."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro.adapters import ALL_LINEAR, Adapters, Group, Site, find_targets, group_by_shape
from blora_pyro.data import IGNORED, Batch, SoftTargets
from blora_pyro.errors import UserError
from blora_pyro.models.encoder import embed, first_adapted, run_layers
from blora_pyro.models.gradient_checkpointing import checkpointed, enable_checkpointing

Prior = Callable[[Site], dist.Distribution]
Penalty = Callable[[Mapping[str, Tensor]], Tensor]  # of the factors of every site


class FactorPrior:
    """p(A, B), the part of the program that is latent: `prior()` draws the factors of every group.

    A_g ~ prior (modules, rank, in_features) and B_g ~ prior (modules, out_features, rank) for every
    group g of target layers of one shape. `BLoRA` is this with a Whisper and its tokens; guides ask
    for no more than this.
    """

    def __init__(self, groups: tuple[Group, ...], prior: Prior, device: torch.device) -> None:
        """The latent program of some groups.

        Args:
            groups: Target layers by shape.
            prior: Site -> Pyro distribution with batch shape (modules,) and event shape (rows,
                columns). A hierarchical one may sample sites of its own.
            device: Where factors are made.
        """
        self.groups = groups
        self.prior = prior
        self.device = device

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of all factors."""
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def num_weights(self) -> int:
        """Number of adapter weights."""
        return sum(math.prod(site.shape) for site in self.sites)

    def draw(self) -> dict[str, Tensor]:
        """Sample every factor: site name -> tensor of the site's shape."""
        factors = {}
        for group in self.groups:
            with self.device:  # priors make their tensors there
                prior_A, prior_B = self.prior(group.A), self.prior(group.B)
            with group.plate():
                factors[group.A.name] = pyro.sample(group.A.name, prior_A)
                factors[group.B.name] = pyro.sample(group.B.name, prior_B)
        return factors

    def __call__(self, *args: object) -> object:
        """`draw`, whatever the arguments."""
        return self.draw()


class BLoRA(FactorPrior):
    """A Pyro model: `model(batch)` draws the factors and scores the batch's tokens.

    Factors as in `FactorPrior`; tokens ~ Categorical(Whisper(x; W0 + alpha/rank · B A)).
    The log-likelihood is the *mean* over the batch's target tokens, so that with `Temper(beta)`
    around model and guide a Pyro ELBO is `mean token NLL + beta · KL` (Ugan, Pham, Waibel,
    arXiv 2510.18723).

    Whisper may have weights in bfloat16 or float16: its activations are then, too, and the factors'
    two products. The factors themselves, their gradients, the token log-probabilities and the KL
    are in float32.

    Sites of a trace: `A_{out}x{in}`, `B_{out}x{in}` (shapes above; batch shape (modules,)), those
    of a hierarchical prior, and `tokens` (batch, tokens), observed unless `batch.labels` is None.
    Two regularisers are factors of the program: `penalty`, and `distillation` where the batch has
    soft targets, `weight` times the mean KL divergence from the teacher's next-token distributions.
    """

    def __init__(
        self,
        net: WhisperForConditionalGeneration,
        prior: Prior,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: str = ALL_LINEAR,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        penalty: Penalty | None = None,
    ) -> None:
        """Freeze `net` and find the layers to adapt.

        Args:
            net: The base Whisper; set to eval mode, and no parameter requires a gradient any more.
            prior: See `FactorPrior`.
            rank: Rank of every update.
            alpha: Updates are scaled by alpha / rank.
            target_modules: See `find_targets`.
            autocast: Run Whisper under autocast to this dtype; factors stay in float32.
            gradient_checkpointing: Keep no activations inside Whisper's layers, and compute them
                again in the backward pass: less memory for about a third more time.
            penalty: Of the drawn factors, added to the loss; see `ElasticPenalty`.

        Raises:
            UserError: If the target modules or the rank do not fit the net, or autocast does not.
        """
        if autocast is not None and net.dtype not in (torch.float32, autocast):
            kinds = [str(kind).removeprefix("torch.") for kind in (net.dtype, autocast)]
            raise UserError(
                f"the base's weights are {kinds[0]}, and precision asks for {kinds[1]}; give "
                "precision fp32 with a half-precision base: it computes in its own anyway"
            )
        groups = group_by_shape(find_targets(net, target_modules), rank)
        super().__init__(groups, prior, net.device)
        self.net = net.requires_grad_(False).eval()
        self.alpha = alpha
        self.autocast = autocast
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            enable_checkpointing(net)
        self.adapters = Adapters(net, groups, alpha)
        modules = (name for group in groups for name in group.modules)
        self.first_adapted = first_adapted(net, modules)
        self.penalty = penalty

    def __call__(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """Draw the factors, put them in place, score the tokens; logits (batch, tokens, vocab)."""
        pyro.module("whisper", self.net)
        factors = self.draw()
        self.place(factors, batch)
        if self.penalty is not None:
            pyro.factor("penalty", -self.penalty(factors))

        layers = checkpointed(self.net) if self.gradient_checkpointing else nullcontext()
        with self._autocast(), layers:
            heard = self._encode(batch)
            logits = self._decode(heard, batch.decoder_input_ids)
            if batch.soft is not None:
                divergence = self._divergence(heard, batch.soft)
                pyro.factor("distillation", -batch.soft.weight * divergence)

        labels = batch.labels
        is_target = True if labels is None else labels != IGNORED
        observed = None if labels is None else labels.clamp(min=0)
        size, length = batch.decoder_input_ids.shape
        with (
            pyro.plate("utterances", size, dim=-2),
            pyro.plate("positions", length, dim=-1),
            poutine.mask(mask=is_target),
            poutine.scale(scale=1.0 / batch.num_tokens),
        ):
            pyro.sample(
                "tokens", dist.Categorical(logits=logits, validate_args=False), obs=observed
            )
        return logits

    def place(self, factors: Mapping[str, Tensor], batch: Batch) -> None:
        """Put drawn factors in place for a batch: the same for all its utterances."""
        self.adapters.put(factors)

    def frozen_states(self, features: Tensor) -> Tensor:
        """The encoder's states before its first adapted layer: no factor changes them.

        Args:
            features: (batch, mels, frames), as `models.encoder.embed` takes them.

        Returns:
            (batch, frames / 2, width).
        """
        with self._autocast():
            layers = self.net.model.encoder.layers[: self.first_adapted]
            return run_layers(layers, embed(self.net, features))

    def _encode(self, batch: Batch) -> BaseModelOutput:
        """The encoder's states (batch, positions, width), with the factors in place."""
        states, encoder = batch.encoder_states, self.net.model.encoder
        if states is None:
            states = self.frozen_states(batch.input_features)
        states = run_layers(encoder.layers[self.first_adapted :], states)
        return BaseModelOutput(last_hidden_state=encoder.layer_norm(states))

    def _autocast(self) -> torch.autocast:
        kind, dtype = self.net.device.type, self.autocast
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)

    def _decode(self, heard: BaseModelOutput, tokens: Tensor) -> Tensor:
        """Logits (batch, tokens, vocab) of every next token, in float32."""
        return self.net(
            encoder_outputs=heard, decoder_input_ids=tokens, use_cache=False
        ).logits.float()

    def _divergence(self, heard: BaseModelOutput, soft: SoftTargets) -> Tensor:
        """KL(teacher || this), the mean over the positions that count, nats."""
        log_probs = self._decode(heard, soft.decoder_input_ids)[soft.is_target].log_softmax(-1)
        teacher = soft.log_probs[soft.is_target].float()
        return kl_div(log_probs, teacher, log_target=True, reduction="sum") / len(teacher)
