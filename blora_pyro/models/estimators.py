"""Gradient estimators: how the noise of one weight draw reaches the tokens of a step.

Effect handlers around a whole Pyro ELBO (as in TyXe, Ritter and Karaletsos, arXiv 2110.00276); the
program, the guide and the KL stay as they are:

    with Flipout():
        loss = elbo.differentiable_loss(model, guide, batch)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import functional

from blora_pyro.adapters import Projection
from blora_pyro.errors import UserError


class Shared(Messenger):
    """One draw of the weights for the whole batch, as the program is written: no effect.

    The noise of all tokens is the same, so that a larger batch does not lessen its variance.
    """


def _identity(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride()


class _Reprojection(Messenger):
    """Answers `projections` of a factor that was drawn from a Normal by maps of its own.

    Which distribution a factor came from is known by the identity of the drawn tensor's memory: the
    guide samples first, and the model's site is replayed with that tensor; the Delta sites that
    Pyro's AutoNormal adds hold a view of it. Any other factor (a point, an observed one, a draw
    from something else) has no noise, or none that can be taken apart, and keeps the default maps.
    Nothing is remembered outside the `with`; the maps live in the adapters.
    """

    def __init__(self) -> None:
        super().__init__()
        # With the tensor, so that its memory is not given to another meanwhile.
        self._drawn: dict[tuple[Any, ...], tuple[Tensor, dist.Normal | None]] = {}

    def __enter__(self) -> Any:
        self._drawn.clear()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._drawn.clear()
        super().__exit__(*error)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            value, base = msg["value"], getattr(msg["fn"], "base_dist", None)
            normal = base if isinstance(base, dist.Normal) else None
            self._drawn.setdefault(_identity(value), (value, normal))

    def _pyro_project(self, msg: Any) -> None:
        (factor,) = msg["args"]
        _, normal = self._drawn.get(_identity(factor), (factor, None))
        if normal is not None:
            msg["value"] = self.projections(factor, normal)

    def projections(self, draw: Tensor, normal: dist.Normal) -> list[Projection]:
        """A map (batch, ..., in) -> (batch, ..., out) for every layer; draw (modules, out, in)."""
        raise NotImplementedError


class Flipout(_Reprojection):
    """y = x meanᵀ + ((x ∘ s) deltaᵀ) ∘ t, delta = draw - mean; s (in) and t (out) random signs.

    delta ∘ (t sᵀ) has the distribution of delta, because that is symmetric and independent by
    element (Wen et al., arXiv 1803.04386). So one draw serves as many.

    `per="utterance"`: s (batch, 1, in) and t (batch, 1, out). Every utterance sees one draw from q
    in all its tokens, and so the expected loss and gradient are exactly those of `Shared`; only the
    correlation between utterances goes. (A layer that is called twice in one forward pass would see
    two draws; Whisper has none.)

    `per="token"`: signs for every token, as the authors of BLoRA have it. Every single output of a
    layer still has the distribution of `Shared`, but the tokens of one utterance are computed with
    different weights. Attention mixes them: a shift that all keys or values shared, and that every
    query saw, becomes noise that the softmax partly averages out. So the loss is that of another,
    milder noise, equal in expectation only where nothing mixes tokens.
    """

    def __init__(self, per: Literal["utterance", "token"] = "utterance") -> None:
        """Draw signs for every utterance, or for every token."""
        super().__init__()
        self.per = per

    def projections(self, draw: Tensor, normal: dist.Normal) -> list[Projection]:
        """The equation above for every layer; (batch, in) counts as utterances of one token."""
        layers = zip(normal.loc.unbind(0), (draw - normal.loc).unbind(0), strict=True)
        return [partial(self._project, mean=mean, delta=delta) for mean, delta in layers]

    def _project(self, x: Tensor, mean: Tensor, delta: Tensor) -> Tensor:
        y = functional.linear(x, mean.to(x.dtype))
        noise = functional.linear(x * self._signs(x), delta.to(x.dtype))
        return y + noise * self._signs(noise)

    def _signs(self, x: Tensor) -> Tensor:
        between = (1,) * (x.dim() - 2) if self.per == "utterance" else x.shape[1:-1]
        signs = x.new_empty((*x.shape[:1], *between, x.shape[-1]))
        return signs.random_(2).mul_(2).sub_(1)  # a quarter of the time of bernoulli_ on a CPU


class LocalReparameterization(_Reprojection):
    """y ~ N(x meanᵀ, (x ∘ x) (sigma ∘ sigma)ᵀ) for every token: the weights' noise, moved to y.

    Kingma, Salimans and Welling, arXiv 1506.02557. Every token has weights of its own, which none
    shares: of the estimators here the least correlated, with the same reservation about attention
    as `Flipout(per="token")`. The noise of `x Aᵀ` is only rank-wide, that of `z Bᵀ` as wide as the
    layer's output (`a-only` has none there). The weight draw of the step is not used, but for a KL
    that has no closed form.
    """

    def projections(self, draw: Tensor, normal: dist.Normal) -> list[Projection]:
        """The equation above for every layer."""
        layers = zip(normal.loc.unbind(0), normal.variance.unbind(0), strict=True)
        return [partial(self._project, mean=mean, variance=variance) for mean, variance in layers]

    @staticmethod
    def _project(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        y = functional.linear(x, mean.to(x.dtype))
        # In float32 also under autocast: sigma² is 1e-5 and less, no normal number in float16, and
        # x² may be too large for it.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            spread = functional.linear(x.to(wide).square(), variance.to(wide))
            spread = spread.clamp_min(torch.finfo(wide).tiny)  # the root of 0 has no gradient
            noise = spread.sqrt() * torch.randn_like(spread)
        return y + noise.to(y.dtype)


ESTIMATORS: dict[str, Callable[[], Messenger]] = {
    "shared": Shared,
    "flipout": Flipout,
    "flipout-token": partial(Flipout, per="token"),
    "local": LocalReparameterization,
}


def build_estimator(name: str) -> Messenger:
    """Return the handler of a name in `ESTIMATORS`.

    Raises:
        UserError: If there is no such name.
    """
    if name not in ESTIMATORS:
        raise UserError(f"estimator is '{name}'; give one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]()
