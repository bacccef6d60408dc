"""What a step minimises, and its gradient: of all the batch at once, or bit by bit."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from blora_pyro.data import Batch, SoftTargets
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.processes import Processes, gradients_of
from blora_pyro.models import Temper, WhisperProgram


class Observed(Messenger):
    """An effect handler that records -log p of every observed site.

    Attributes:
        terms: Site name -> scalar, scaled and masked as in the ELBO, nats.
    """

    def __init__(self) -> None:
        """Start with no terms; every `with` starts anew."""
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def __enter__(self) -> Any:
        """Forget the terms of the last `with`."""
        self.terms = {}
        return super().__enter__()

    @torch.no_grad()
    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
            self.terms[msg["name"]] = -log_prob.sum()


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The utterances of a batch in `count` parts of nearly equal size, or one in each."""
    count = min(count, len(batch.input_features))
    features, inputs = (
        part.tensor_split(count) for part in (batch.input_features, batch.decoder_input_ids)
    )
    labels, sources, states = (
        [None] * count if part is None else part.tensor_split(count)
        for part in (batch.labels, batch.sources, batch.encoder_states)
    )
    columns = zip(features, inputs, labels, sources, states, strict=True)
    parts = [Batch(*own[:3], sources=own[3], encoder_states=own[4]) for own in columns]
    if batch.soft is None:
        return parts
    softs = _soft_parts(batch.soft, count)
    # `Objective` gives a part its share of the labels; every soft target is to count alike.
    shares = [part.num_tokens / batch.num_tokens for part in parts]
    return [
        replace(part, soft=replace(soft, weight=soft.weight / share))
        for part, soft, share in zip(parts, softs, shares, strict=True)
    ]


def _soft_parts(soft: SoftTargets, count: int) -> list[SoftTargets]:
    """Parts, weighted by their shares of the positions that count."""
    columns = (soft.decoder_input_ids, soft.log_probs, soft.is_target)
    parts = zip(*(column.tensor_split(count) for column in columns), strict=True)
    return [
        SoftTargets(inputs, log_probs, where, soft.weight * int(where.sum()) / soft.num_tokens)
        for inputs, log_probs, where in parts
    ]


class Objective:
    """`mean token NLL + beta · KL` of a batch, and its gradient by the guide's parameters.

    Where the program has a regulariser (distillation, EWC), so has the loss.

    One weight draw w ~ q, whatever `accumulation`, the number K of micro-batches. With n_k of the n
    target tokens in the k-th,

        mean token NLL + beta · KL = sum over k of (n_k / n) (mean token NLL of k + beta · KL),

    so the gradients of the terms on the right, added up one backward pass after the other, are that
    of the batch: with `shared` noise exactly, otherwise in distribution (the signs and the noise
    that an estimator draws in the layers come in another order). No more activations are in memory
    than those of one micro-batch.

    Where Whisper is in float16 the loss is multiplied before its backward pass by a power of two,
    and the gradient divided by it, lest gradients of activations vanish below 6e-8 (Micikevicius et
    al., arXiv 1710.03740). As in `torch.amp.GradScaler` the scale is halved when a gradient
    overflows, and doubled after many steps without; but the step is not lost: it is computed
    again from the same draw.

    In several processes each has a part of the batch, n_k of its n target tokens, as above: its
    gradient is multiplied by n_k, and the sum of all divided by n, so that a step takes one
    message. (The regularisers' terms are averaged with the same weights.)

    Attributes:
        scale: What the loss is multiplied by; 1 unless Whisper is in float16.
        steps_at_scale: Steps since it was changed.
        regularizer: What the last loss had of the program's regularisers.
        tokens: Target tokens of the last batch, those of all processes.
    """

    GROWTH_STEPS = 2000
    LARGEST_SCALE = 2.0**24

    def __init__(
        self,
        model: WhisperProgram,
        guide: nn.Module,
        *,
        beta: float,
        estimator: Messenger,
        accumulation: int = 1,
        processes: Processes | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        """The objective of a model and its guide, in one process or in several."""
        self.model, self.guide, self.estimator = model, guide, estimator
        self.temper, self.accumulation = Temper(beta), accumulation
        self.elbo, self.observed = TraceMeanField_ELBO(), Observed()
        self.scale = 2.0**16 if model.net.dtype is torch.float16 else 1.0
        self.steps_at_scale = 0
        self.regularizer, self.tokens = 0.0, 0
        self.processes = processes or Processes()
        self.interrupts = interrupts or Interrupts(active=False)

    def gradients(self, batch: Batch | None, max_norm: float = math.inf) -> tuple[float, float]:
        """Loss and NLL in nats; the gradient is left in the guide's parameters.

        Args:
            batch: On the device of the model; of several processes this one's part, None if it has
                none.
            max_norm: Clip the gradient to this norm, all parameters together.

        Returns:
            The loss, or the gradient's norm where only that is not finite; the NLL.

        Raises:
            ProcessLost: If one of several processes is gone.
        """
        before = self.scale
        random = RandomState.now(self.model.device) if self.scale > 1 else None
        while True:
            loss, nll = self._meet(batch)
            if not math.isfinite(loss):
                return loss, nll
            norm = nn.utils.clip_grad_norm_(self.guide.parameters(), max_norm).item()
            if math.isfinite(norm):
                self._keep_scale(before)
                return loss, nll
            if random is None or self.scale <= 1:
                self.scale = before
                return norm, nll
            self.scale /= 2
            random.restore(self.model.device)

    def _keep_scale(self, before: float) -> None:
        """Count a step without an overflow; after many the scale may grow."""
        self.steps_at_scale = self.steps_at_scale + 1 if self.scale == before else 0
        if before > 1 and self.steps_at_scale >= self.GROWTH_STEPS:
            self.scale = min(2 * self.scale, self.LARGEST_SCALE)
            self.steps_at_scale = 0

    def _meet(self, batch: Batch | None) -> tuple[float, float]:
        """Loss and NLL of all processes' parts; likewise the gradients."""
        if self.processes.count == 1:
            assert batch is not None
            self.tokens = batch.num_tokens
            return self._accumulate(batch)
        self.guide.zero_grad()
        loss, nll, tokens = 0.0, 0.0, 0
        if batch is not None:
            loss, nll = self._accumulate(batch)
            tokens = batch.num_tokens
        gradients = gradients_of(self.guide.parameters())
        torch._foreach_mul_(gradients, float(tokens))
        numbers = [loss, nll, self.regularizer] if tokens else [0.0] * 3
        weighted = [tokens * one for one in numbers]
        sums = self.processes.add_up(gradients, [*weighted, float(tokens)], self.interrupts)
        *totals, total = sums
        torch._foreach_div_(gradients, total)
        loss, nll, self.regularizer = (one / total for one in totals)
        self.tokens = round(total)
        return loss, nll

    def _accumulate(self, batch: Batch) -> tuple[float, float]:
        """Loss and NLL; their gradients are added up, unless they are not finite."""
        self.guide.zero_grad()
        loss = nll = self.regularizer = 0.0
        try:
            parts = micro_batches(batch, self.accumulation)
            guide = self._one_draw(batch) if len(parts) > 1 else self.guide
            for part in parts:
                share = part.num_tokens / batch.num_tokens
                with self.estimator, self.observed:
                    programs = self.temper(self.model), self.temper(guide)
                    term = share * self.elbo.differentiable_loss(*programs, part)
                nll += share * self.observed.terms.pop("tokens").item()
                self.regularizer += share * sum(one.item() for one in self.observed.terms.values())
                loss += term.item()
                if not math.isfinite(loss):
                    break
                # What the draw came from is needed again; the activations of this part go with it.
                (self.scale * term).backward(retain_graph=part is not parts[-1])
                del term
        except ValueError as error:
            if "found invalid values" not in str(error):
                raise
            return math.nan, math.nan  # so say distributions whose parameters are not finite
        self._unscale()
        return loss, nll

    def _one_draw(self, batch: Batch) -> Callable[..., object]:
        """The guide with everything drawn already."""
        return poutine.replay(self.guide, trace=poutine.trace(self.guide).get_trace(batch))

    def _unscale(self) -> None:
        if self.scale == 1:
            return
        for parameter in self.guide.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.scale
