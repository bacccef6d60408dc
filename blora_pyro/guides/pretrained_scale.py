"""`pretrained-scale`: a Normal prior as wide as the weights of the layer that it adapts."""

import pyro.distributions as dist
import torch

from blora_pyro.adapters import Site
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides.normal import Guide

__all__ = ["Guide", "Prior"]

EXPLANATION = (
    "A pretrained scale shrinks layer by layer: each prior is {scale:g} times as wide as the "
    "layer's frozen weights, here from {narrowest:.2g} to {widest:.2g}, so a layer with small "
    "weights may move less. Within a layer it is a Normal and treats all ranks alike."
)


class Prior:
    """p(w) = N(w; 0, (scale · sd(W0))²), sd(W0) being that of the layer's own frozen weight.

    A layer whose weights are large may move further than one whose weights are small, as in
    VI-LoRA (arXiv 2509.20397). Fitted by the mean-field Normal guide of `normal`; the KL is that
    of two Normals, in closed form.
    """

    def __init__(self, scale: float = 1.0) -> None:
        """A Normal prior with a width of its own for every layer.

        Args:
            scale: Standard deviation in units of that of the layer's frozen weight.
        """
        check_positive(scale=scale)
        self.scale = scale

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns).

        Raises:
            UserError: If the standard deviations of the frozen weights are not known.
        """
        if not site.weight_stddevs:
            raise UserError(
                "pretrained-scale needs the base model's weights; fit with a base model"
            )
        scales = self.scale * torch.tensor(site.weight_stddevs)
        return dist.Normal(0.0, scales[:, None, None]).expand(site.shape).to_event(2)
