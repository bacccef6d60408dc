"""Elastic weight consolidation: a penalty on updates of the weights that the base needs."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Group
from blora_pyro.data import Batch, Examples
from blora_pyro.models.encoder import encode

UTTERANCES = 64  # of every set, spread evenly over it


def fisher_information(
    net: WhisperForConditionalGeneration,
    groups: tuple[Group, ...],
    sets: Iterable[Examples],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the target layers' frozen weights, per token.

    F = E[(d log p(y | x, W) / dW)²] / (tokens an utterance), over the sets' audio and the model's
    own predictions: at every position of the true transcript a token is drawn from what the model
    predicts there, which true labels in its place would only imitate (Kunstner et al., arXiv
    1905.12558).

    Args:
        net: The frozen base, without adapters in place.
        groups: Target layers by shape.
        sets: Data that the base should not forget; up to 64 utterances of each.
        seed: Seed of the tokens drawn.

    Returns:
        Group key -> (modules, out_features, in_features), float32.
    """
    layers = [name for group in groups for name in group.modules]
    weights = [net.get_parameter(f"{name}.weight") for name in layers]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    generator = torch.Generator(net.device).manual_seed(seed)
    tokens = 0
    for examples in sets:
        count = min(UTTERANCES, len(examples))
        for index in torch.linspace(0, len(examples) - 1, count).round().long().tolist():
            batch = examples.batch([index]).to(net.device)
            tokens += batch.num_tokens
            for total, gradient in zip(totals, _score(net, weights, batch, generator), strict=True):
                total += gradient.float().square()
    by_layer = dict(zip(layers, totals, strict=True))
    return {
        group.key: torch.stack([by_layer[name] for name in group.modules]) / max(tokens, 1)
        for group in groups
    }


def _score(
    net: WhisperForConditionalGeneration,
    weights: list[Tensor],
    batch: Batch,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Return the gradient by the weights of one utterance's log-likelihood, its tokens drawn."""
    assert batch.labels is not None
    is_target = batch.labels >= 0
    for weight in weights:
        weight.requires_grad_(True)
    try:
        logits = net(
            encoder_outputs=(encode(net, batch.input_features),),
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits[is_target]
        log_probs = logits.float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        return torch.autograd.grad(log_probs.gather(1, drawn).sum(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


class ElasticPenalty:
    """strength / 2 · sum of F ∘ ΔW ∘ ΔW, with ΔW = alpha/rank · B A of every target layer.

    Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796) of a low-rank update. With
    the Fisher information of one token, as `fisher_information` gives it, strength 1 is the Laplace
    posterior of as many tokens of old data as there are of new ones.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        scalings: Mapping[str, float],
        fisher: Mapping[str, Tensor],
        strength: float,
    ) -> None:
        """`scalings` as of `scalings_of`, `fisher` as `fisher_information` returns it."""
        self.groups, self.scalings = groups, scalings
        self.fisher, self.strength = fisher, strength

    def __call__(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of factors, site name -> tensor of the site's shape; nats a token."""
        total = torch.zeros(())
        for group in self.groups:
            product = factors[group.B.name] @ factors[group.A.name]
            squares = (self.fisher[group.key] * product.square()).sum()
            total = total + self.scalings[group.key] ** 2 * squares
        return 0.5 * self.strength * total
