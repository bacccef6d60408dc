"""`laplace`: independent Laplace prior, which pulls small weights harder than large ones."""

import pyro.distributions as dist

from blora_pyro.adapters import Site
from blora_pyro.errors import check_positive
from blora_pyro.guides.normal import Guide

__all__ = ["Guide", "Prior"]

EXPLANATION = (
    "A Laplace prior pulls with one force whatever a weight's size: small weights are pressed "
    "closer to 0 than under a Normal of the same width, large ones are held back less. It "
    "works weight by weight and knows nothing of ranks."
)


class Prior:
    """p(w) = exp(-|w| / scale) / (2 scale) for every element of A and B (the Bayesian lasso's).

    Fitted by the mean-field Normal guide of `normal`. The KL is closed-form, because |w| is a
    folded Normal under q: KL = E|w| / scale + log(2 scale) - log(2 pi e sigma²) / 2 with
    E|w| = sigma sqrt(2 / pi) exp(-mean² / (2 sigma²)) + mean erf(mean / (sigma sqrt 2)).
    Park and Casella, The Bayesian Lasso, JASA 103 (2008); folded Normal: Leone et al. (1961).
    """

    def __init__(self, scale: float = 0.05) -> None:
        """A double exponential around 0.

        Args:
            scale: Mean of |w|; the standard deviation is sqrt(2) times it.
        """
        check_positive(scale=scale)
        self.scale = scale

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns)."""
        return dist.Laplace(0.0, self.scale).expand(site.shape).to_event(2)
