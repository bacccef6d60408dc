"""BLoRA as a probabilistic program: a frozen Whisper whose low-rank updates are latent."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import ALL_LINEAR, Adapters, Group, Site, find_targets, group_by_shape
from blora_pyro.data import IGNORED, Batch
from blora_pyro.models.likelihood import Likelihood, WhisperLikelihood

Density = Callable[[Site], dist.Distribution]
Penalty = Callable[[Mapping[str, Tensor]], Tensor]  # site name -> factor; a scalar in nats


class FactorPrior:
    """p(A, B), the latent part of the program: `prior()` draws the factors of every group.

    A_g ~ prior (modules, rank, in_features) and B_g ~ prior (modules, out_features, rank) for every
    group g of target layers of one shape. `BLoRA` adds a Whisper and its tokens; guides need this
    part only.
    """

    def __init__(self, groups: tuple[Group, ...], prior: Density, device: torch.device) -> None:
        """The latent program of groups of target layers; factors are made on `device`.

        `prior` gives a site's distribution: batch shape (modules,), event shape (rows, columns);
        see `guides.contracts.Prior`.
        """
        self.groups = groups
        self.prior = prior
        self.device = device

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites of all factors."""
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `draw`; the arguments are ignored."""
        return self.draw()


class WhisperProgram(FactorPrior):
    """A Pyro model: `model(batch)` draws the factors and scores the batch's tokens.

    Factors as in `FactorPrior`; tokens ~ Categorical(likelihood(batch)) with the factors in place.
    The log-likelihood is the *mean* over the batch's target tokens, so that with `Temper(beta)`
    around model and guide a Pyro ELBO is `mean token NLL + beta · KL` (Ugan, Pham, Waibel,
    arXiv 2510.18723).

    Sites of a trace: `A_{out}x{in}`, `B_{out}x{in}` (shapes above; batch shape (modules,)), those
    of a hierarchical prior, and `tokens` (batch, tokens), observed unless `batch.labels` is None.
    Regularisers are factors of the program: `penalty`, and those of the likelihood.

    Without groups nothing is latent, and the loss is the mean token NLL alone.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        groups: tuple[Group, ...],
        prior: Density,
        alpha: float = 1.0,
        penalty: Penalty | None = None,
    ) -> None:
        """The program of a net whose layers of `groups` are adapted.

        Updates are scaled by alpha / rank; the penalty of the drawn factors is added to the loss.
        """
        super().__init__(groups, prior, likelihood.net.device)
        self.likelihood, self.net = likelihood, likelihood.net
        self.alpha, self.penalty = alpha, penalty
        self.adapters = Adapters(self.net, groups, alpha)

    def __call__(self, batch: Batch) -> Tensor:
        """Draw the factors, put them in place, score the tokens; logits (batch, tokens, vocab)."""
        pyro.module("whisper", self.net)
        factors = self.draw()
        self.place(factors, batch)
        logits, penalties = self.likelihood(batch)
        if self.penalty is not None:
            penalties = {"penalty": self.penalty(factors), **penalties}
        for name, penalty in penalties.items():
            pyro.factor(name, -penalty)

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
            tokens = dist.Categorical(logits=logits, validate_args=False)
            pyro.sample("tokens", tokens, obs=observed)
        return logits

    def place(self, factors: Mapping[str, Tensor], batch: Batch) -> None:
        """Put drawn factors in place for a batch: the same for all its utterances."""
        self.adapters.put(factors)


class BLoRA(WhisperProgram):
    """`WhisperProgram` of a frozen Whisper with low-rank updates W0 + alpha/rank · B A.

    The factors, their gradients, the token log-probabilities and the KL are in float32, whatever
    the dtype of Whisper's weights.
    """

    likelihood: WhisperLikelihood

    def __init__(
        self,
        net: WhisperForConditionalGeneration,
        prior: Density,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: str = ALL_LINEAR,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        penalty: Penalty | None = None,
        *,
        exclude_modules: str | None = None,
        layers: Sequence[int] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        use_rslora: bool = False,
    ) -> None:
        """Freeze `net` and find the layers to adapt.

        Args:
            net: The base Whisper; set to eval mode, and no parameter requires a gradient any more.
            prior: See `FactorPrior`.
            rank: Rank of every update.
            alpha: Updates are scaled by alpha / rank.
            target_modules: See `find_targets`, like `exclude_modules` and `layers`.
            autocast: As of `WhisperLikelihood`, like `gradient_checkpointing`.
            gradient_checkpointing: Less memory for more time.
            penalty: Added to the loss; see `ElasticPenalty`.
            exclude_modules: Layers to leave out.
            layers: Numbers of blocks.
            rank_pattern: See `group_by_shape`, like `use_rslora`.
            use_rslora: Updates are scaled by alpha / √rank.

        Raises:
            UserError: If the target modules or the rank do not fit the net, or autocast does not.
        """
        targets = find_targets(net, target_modules, exclude_modules, layers)
        groups = group_by_shape(targets, rank, rank_pattern, use_rslora)
        modules = [name for group in groups for name in group.modules]
        net.requires_grad_(False)
        likelihood = WhisperLikelihood(net, modules, autocast, gradient_checkpointing)
        super().__init__(likelihood, groups, prior, alpha, penalty)
