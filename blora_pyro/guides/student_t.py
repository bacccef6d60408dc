"""`student-t`: independent Student-t prior, narrow in the middle and forgiving in the tails."""

import pyro.distributions as dist

from blora_pyro.adapters import Site
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides.normal import Guide

__all__ = ["Guide", "Prior"]

EXPLANATION = (
    "A Student-t prior (df {df:g}) holds on in the middle and lets go in the tails: weights "
    "near 0 are pulled like under a narrow Normal, one several scales away hardly at all. It "
    "works weight by weight and knows nothing of ranks."
)


class Prior:
    """p(w) = t(w; df, 0, scale) ∝ (1 + (w / scale)² / df)^(-(df + 1) / 2) for every element.

    It is a Normal prior whose variance is drawn per weight from an inverse gamma (Tipping, Sparse
    Bayesian Learning, JMLR 1 (2001)). Fitted by the mean-field Normal guide of `normal`. The KL has
    no closed form: log q - log p at the step's own weight draw estimates it without bias, and the
    sum over the weights makes its relative noise small.
    """

    def __init__(self, scale: float = 0.05, df: float = 4.0) -> None:
        """A heavy-tailed prior around 0.

        Args:
            scale: Scale; the standard deviation is sqrt(df / (df - 2)) times it.
            df: Degrees of freedom, above 2: small is heavy-tailed, large is Normal.
        """
        check_positive(scale=scale, df=df)
        if df <= 2:
            raise UserError(f"df is {df}; give a number above 2, so that the variance is finite")
        self.scale, self.df = scale, df

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns)."""
        return dist.StudentT(self.df, 0.0, self.scale).expand(site.shape).to_event(2)
