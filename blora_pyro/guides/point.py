"""`point`: one point instead of a distribution, so that the same program fits plain LoRA.

Against the `normal` prior it is the MAP estimate (L2-to-zero LoRA with strength
beta / (2 scale²)); with beta = 0 it is LoRA (Hu et al., arXiv 2106.09685). Under a prior whose
weights depend on one another the point is one in its independent coordinates, see
`contracts.NonCentredPrior`: so steps are smaller where that prior is narrower.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from blora_pyro.guides.contracts import maps_of
from blora_pyro.guides.normal import Prior, initial_mean
from blora_pyro.models import FactorPrior

__all__ = ["Guide", "Prior"]


class Guide(nn.Module):
    """q(w) = delta(w - mean): KL(q || p) is -log p(mean), up to the infinite constant."""

    def __init__(self, model: FactorPrior) -> None:
        """One parameter of shape `site.shape` for every site of `model`."""
        super().__init__()
        self.groups = model.groups
        self.means = nn.ParameterDict({site.name: initial_mean(site) for site in model.sites})
        self.maps = maps_of(model)

    def _point(self, name: str) -> Tensor:
        """The factor of a site."""
        mean = self.means[name]
        point: Tensor = self.maps[name](mean) if name in self.maps else mean
        return point

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Visit every site; takes the model's arguments, returns site name -> point."""
        pyro.module("guide", self)
        points = {}
        for group in self.groups:
            with group.plate():
                for site in group.sites:
                    delta = dist.Delta(self._point(site.name), event_dim=2)
                    points[site.name] = pyro.sample(site.name, delta)
        return points

    def mean(self) -> dict[str, Tensor]:
        """The point of every site."""
        return {name: self._point(name).detach() for name in self.means}

    def stddev(self) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros_like(mean) for name, mean in self.mean().items()}
