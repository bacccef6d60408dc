"""The Normal of mean-field guides, whose KL to another takes half the passes over memory."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence, register_kl


class MeanFieldNormal(dist.Normal):
    """N(loc, scale²) element by element, as `Normal`."""


@register_kl(MeanFieldNormal, Normal)
def _kl(q: MeanFieldNormal, p: Normal) -> Tensor:
    """KL(q || p) of every element; torch's own where `p` is differentiated or of another shape."""
    if p.loc.requires_grad or p.scale.requires_grad or p.batch_shape != q.batch_shape:
        return kl_divergence(Normal(q.loc, q.scale, validate_args=False), p)
    return _KL.apply(q.loc, q.scale, _one_of(p.loc), _one_of(p.scale))


class _KL(torch.autograd.Function):
    """(sigma² + (mu - m)²) / (2 s²) - log(sigma / s) - 1/2, of N(mu, sigma²) from N(m, s²).

    The gradients are (mu - m) / s² and sigma / s² - 1 / sigma. Written out, for autograd keeps and
    walks a tensor for every operation, and these are as large as all parameters together.
    """

    @staticmethod
    def forward(ctx: Any, mu: Tensor, sigma: Tensor, m: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(mu, sigma, m, s)
        ratio, distance = sigma / s, (mu - m).div_(s)
        kl = ratio.log().neg_()
        return (
            kl.addcmul_(ratio, ratio, value=0.5).addcmul_(distance, distance, value=0.5).sub_(0.5)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mu, sigma, m, s = ctx.saved_tensors
        grad = _one_of(grad)
        weight = grad / s.square()
        return (mu - m).mul_(weight), (sigma * weight).sub_(grad / sigma), None, None


def _one_of(tensor: Tensor) -> Tensor:
    """The number that a tensor is expanded from, or the tensor."""
    return tensor if any(tensor.stride()) else tensor[(0,) * tensor.dim()]
