"""beta: the weight of the KL term, as a Pyro effect handler."""

from typing import Any

from pyro.poutine.messenger import Messenger


class Temper(Messenger):
    """Weigh the log-density of every latent site by `beta`, and leave observed sites alone.

    Applied to model *and* guide it turns any Pyro ELBO into

        loss = E_q[-log p(y | x, A, B)] + beta · KL(q || p)

    `TraceMeanField_ELBO` weighs a closed-form KL by the scale of the guide's site, `Trace_ELBO` the
    two log-densities by that of their own sites: so the same handler is applied to both. With the
    likelihood a mean over N training tokens, `beta = 1 / N` is the exact negative ELBO per token,
    and `T = beta · N` the temperature of the posterior.

    `beta = 0` masks the sites: the noise stays, without the KL. Apply it outside
    `poutine.condition`, so that it sees which sites are observed.

        temper = Temper(beta=1e-4)
        svi = SVI(temper(model), temper(guide), optimiser, TraceMeanField_ELBO())
    """

    def __init__(self, beta: float) -> None:
        """Raise ValueError if beta is negative or not finite."""
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a finite number >= 0, not {beta}")
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if self.beta == 0:
            msg["mask"] = False
        else:
            msg["scale"] = msg["scale"] * self.beta
