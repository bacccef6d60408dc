"""`scale-mixture`: two Gaussians, a narrow spike and a wide slab."""

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from blora_pyro.adapters import Site
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides.normal import Guide

__all__ = ["Guide", "Prior"]

EXPLANATION = (
    "A scale mixture takes a weight for noise (a spike of width {spike_scale:g}, hard pull) or "
    "for signal (a slab of width {scale:g}, soft pull), weight by weight: small weights are "
    "pressed into the spike, large ones are left to the slab."
)


class Prior:
    """p(w) = slab N(w; 0, scale²) + (1 - slab) N(w; 0, spike_scale²) for every element of A and B.

    The continuous spike and slab of Blundell et al. (Weight Uncertainty in Neural Networks,
    arXiv 1505.05424, eq. 7). Fitted by the mean-field Normal guide of `normal`. The KL has no
    closed form: log q - log p at the step's own weight draw estimates it without bias.
    """

    def __init__(self, scale: float = 0.07, spike_scale: float = 0.02, slab: float = 0.5) -> None:
        """A mixture of two Normals around 0.

        Args:
            scale: Standard deviation of the slab, for the weights that are used.
            spike_scale: Standard deviation of the spike, for those that are not; below scale.
            slab: Share of the slab, between 0 and 1.
        """
        check_positive(scale=scale, spike_scale=spike_scale)
        if not spike_scale < scale:
            raise UserError(f"spike_scale is {spike_scale}; give a number below scale ({scale})")
        if not 0 < slab < 1:
            raise UserError(f"slab is {slab}; give a share between 0 and 1")
        self.scale, self.spike_scale, self.slab = scale, spike_scale, slab

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns)."""
        shares = dist.Categorical(torch.tensor([self.slab, 1 - self.slab]))
        parts = dist.Normal(0.0, torch.tensor([self.scale, self.spike_scale]))
        return _Mixture(shares, parts).expand(site.shape).to_event(2)


class _Mixture(dist.MixtureSameFamily):
    support = constraints.real  # what torch gives instead is unknown to Pyro's automatic guides
