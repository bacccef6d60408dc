"""`a-only`: A is random and B is a point, as in BLoB."""

import pyro.distributions as dist
import torch
from torch import Tensor

from blora_pyro.adapters import Site
from blora_pyro.guides import normal
from blora_pyro.guides.normal import Prior
from blora_pyro.models import FactorPrior

__all__ = ["Guide", "Prior"]

EXPLANATION = (
    "A Normal prior that pulls all weights in proportion to their size, but with noise in A "
    "alone: B is a point with an L2 pull, so contraction, signal-to-noise and KL are those of "
    "A, and the spread of ΔW is what A leaves open."
)


class Guide(normal.Guide):
    """q(A) = N(mean, sigma²) and q(B) = delta(B - mean_B): B is its MAP estimate.

    Half the noise and half the parameters of `normal` for the variance: BA is Gaussian, with the
    rank of B (Wang et al., BLoB, arXiv 2406.11675, section 3.1). KL(q || p) is closed-form for A;
    for B it is -log p(mean_B), up to the infinite constant (an L2 pull of strength
    1 / (2 scale²), where BLoB has none).
    """

    def __init__(self, model: FactorPrior) -> None:
        """A mean for every site of `model`, and a rho for every A."""
        super().__init__(model)
        for site in model.sites:
            if site.factor == "B":
                del self.rhos[site.name]

    def distribution(self, site: Site) -> dist.Distribution:
        """Q of a site: batch shape (modules,), event shape (rows, columns)."""
        if site.factor == "A":
            return super().distribution(site)
        return dist.Delta(self.means[site.name], event_dim=2)

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site: 0 for B."""
        zeros = {name: torch.zeros_like(mean) for name, mean in self.mean().items()}
        return zeros | super().stddev()
