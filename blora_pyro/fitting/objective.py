"""The loss of a step and its gradient, of the whole batch at once or of micro-batches in turn."""

import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from blora_pyro.data import Batch
from blora_pyro.fitting.batches import micro_batches
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.processes import Processes
from blora_pyro.models import Temper, WhisperProgram


class Observed(Messenger):
    """An effect handler that records -log p of every observed site.

    Attributes:
        terms: Site name -> scalar, scaled and masked as in the ELBO, nats.
    """

    def __init__(self) -> None:
        """Start with no terms."""
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
    and the gradient divided by it, or gradients of activations vanish below 6e-8 (Micikevicius et
    al., arXiv 1710.03740). As in `torch.amp.GradScaler` the scale is halved when a gradient
    overflows, and doubled after many steps without; but the step is not lost: it is computed
    again from the same draw.

    In several processes each has a part of the batch, n_k of its n target tokens, as above: its
    gradient is multiplied by n_k, and the sum of all divided by n, so that a step takes one
    message. (The regularisers' terms are averaged with the same weights.)

    Attributes:
        scale: Factor on the loss before its backward pass; 1 unless Whisper is in float16.
        steps_at_scale: Steps since it was changed.
        regularizer: The part of the last loss that is the program's regularisers, nats.
        tokens: Target tokens of the last batch, those of all processes.
        grad_norm: Norm of the last gradient before it was clipped, all parameters together.
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
        """Build the objective of a model and its guide, in one process or in several."""
        self.model, self.guide, self.estimator = model, guide, estimator
        self.temper, self.accumulation = Temper(beta), accumulation
        self.elbo, self.observed = TraceMeanField_ELBO(), Observed()
        self.scale = 2.0**16 if model.net.dtype is torch.float16 else 1.0
        self.steps_at_scale = 0
        self.regularizer, self.tokens, self.grad_norm = 0.0, 0, math.nan
        self.processes = processes or Processes()
        self.interrupts = interrupts or Interrupts(active=False)

    def gradients(self, batch: Batch | None, max_norm: float = math.inf) -> tuple[float, float]:
        """Return loss and NLL in nats; leave the gradient in the guide's parameters.

        In place of the loss it returns the gradient's norm where only that is not finite.

        Args:
            batch: On the device of the model; of several processes this one's part, None if it has
                none.
            max_norm: Clip the gradient to this norm, all parameters together.

        Raises:
            ProcessLost: If one of several processes is gone.
        """
        before = self.scale
        random = RandomState.now(self.model.device) if self.scale > 1 else None
        while True:
            loss, nll = self._gradients_of_all(batch)
            if not math.isfinite(loss):
                return loss, nll
            norm = nn.utils.clip_grad_norm_(self.guide.parameters(), max_norm).item()
            if math.isfinite(norm):
                self.grad_norm = norm
                break
            if random is None or self.scale <= 1:
                self.scale = before
                return norm, nll
            self.scale /= 2
            random.restore(self.model.device)
        self.steps_at_scale = self.steps_at_scale + 1 if self.scale == before else 0
        if before > 1 and self.steps_at_scale >= self.GROWTH_STEPS:
            self.scale, self.steps_at_scale = min(2 * self.scale, self.LARGEST_SCALE), 0
        return loss, nll

    def _gradients_of_all(self, batch: Batch | None) -> tuple[float, float]:
        """Return loss and NLL of all processes' parts together; leave their gradients."""
        if self.processes.count == 1:
            assert batch is not None
            self.tokens = batch.num_tokens
            return self._accumulate(batch)
        self.guide.zero_grad()
        loss, nll, tokens = 0.0, 0.0, 0
        if batch is not None:
            loss, nll = self._accumulate(batch)
            tokens = batch.num_tokens
        gradients = []
        for one in self.guide.parameters():
            if one.grad is None:
                one.grad = torch.zeros_like(one)
            gradients.append(one.grad)
        torch._foreach_mul_(gradients, float(tokens))
        numbers = [loss, nll, self.regularizer] if tokens else [0.0] * 3
        weighted = [*(tokens * one for one in numbers), float(tokens)]
        *totals, total = self.processes.sum_over_all(gradients, weighted, self.interrupts)
        torch._foreach_div_(gradients, total)
        loss, nll, self.regularizer = (one / total for one in totals)
        self.tokens = round(total)
        return loss, nll

    def _accumulate(self, batch: Batch) -> tuple[float, float]:
        """Return loss and NLL; add up the gradients of the micro-batches, while they are finite."""
        self.guide.zero_grad()
        loss = nll = self.regularizer = 0.0
        try:
            parts = micro_batches(batch, self.accumulation)
            guide: Any = self.guide
            if len(parts) > 1:  # one draw for all of them
                guide = poutine.replay(guide, trace=poutine.trace(guide).get_trace(batch))
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
                # The draw's graph is needed again; the activations of this part go with `term`.
                (self.scale * term).backward(retain_graph=part is not parts[-1])
                del term
        except ValueError as error:
            if "found invalid values" not in str(error):
                raise
            return math.nan, math.nan  # raised by distributions whose parameters are not finite
        for parameter in self.guide.parameters() if self.scale != 1 else ():
            if parameter.grad is not None:
                parameter.grad /= self.scale
        return loss, nll
