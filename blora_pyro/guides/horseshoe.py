"""`horseshoe`: a regularised horseshoe over ranks, so that whole ranks switch off."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from blora_pyro.adapters import Site
from blora_pyro.errors import check_positive
from blora_pyro.guides import normal
from blora_pyro.guides.contracts import prior_scale
from blora_pyro.models import FactorPrior

GAIN = 10.0  # how much faster than weights log lambda moves under Adam: it has far to go
CLOSED = 0.2  # tau / scale at the start: the data must open a rank, which is seen at once
SPREAD = 0.1  # standard deviation of log tau and log lambda in the guide at the start
NODES, WEIGHTS = (torch.from_numpy(x).float() for x in np.polynomial.hermite_e.hermegauss(33))
WEIGHTS = WEIGHTS / WEIGHTS.sum()

EXPLANATION = (
    "A horseshoe decides rank by rank, not weight by weight: a rank is left nearly as free as "
    "under a Normal of width {scale:g}, or is switched off with all its weights. Of {rank} "
    "ranks {active} are active in the median layer and {most_active} in the one with the most; "
    "{closed} of all ranks are switched off (shrinkage factor above {switched_off:g}). Contraction "
    "is high where ranks are off, too: their width is gone, whatever the data said."
)


def gate(tau_lambda: Tensor, scale: float) -> Tensor:
    """G = t / sqrt(scale² + t²) for t = tau · lambda: 0 far below `scale`, 1 far above."""
    return (logsigmoid(2 * (tau_lambda / scale).log()) / 2).exp()  # no square that overflows


class Prior:
    """p(w | g) = N(w; 0, (g scale)²) with a gate g = t / sqrt(scale² + t²), t = tau lambda, a rank.

    tau ~ HalfCauchy(global_scale), one a site (`{site}_global`, scalar); lambda ~ HalfCauchy(1),
    one a layer and rank (`{site}_local`, (modules, rank)). Piironen and Vehtari, arXiv 1707.01694,
    eq. 2.8, the slab's width fixed. The shrinkage factor of a rank, 1 - g², is near 1 for a rank
    that is switched off and near 0 for one that is as free as under `normal`.
    """

    def __init__(self, scale: float = 0.05, global_scale: float = 0.01) -> None:
        """A regularised horseshoe around 0.

        Args:
            scale: Standard deviation of the slab: the widest that a rank can get.
            global_scale: Median of tau: the width of a rank that nothing is known of.
        """
        check_positive(scale=scale, global_scale=global_scale)
        self.scale, self.global_scale = scale, global_scale

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns); samples the two scales."""
        tau = pyro.sample(f"{site.name}_global", dist.HalfCauchy(self.global_scale))
        ones = torch.ones(site.rank_shape)
        local = pyro.sample(f"{site.name}_local", dist.HalfCauchy(ones).to_event(2))
        width = self.scale * site.per_rank(gate(tau * local, self.scale))
        return dist.Normal(0.0, width).expand(site.shape).to_event(2)


class Guide(normal.Guide):
    """tau and lambda log-normal, w = g · m with m ~ N(mean, sigma²): the non-centred form.

    Given the scales the guide draws w from N(g mean, (g sigma)²), so KL(q(w | g) || p(w | g)) is
    that of N(mean, sigma²) against N(0, scale²) in closed form, whatever g. A rank whose gate
    closes adds no noise, so that its m can go back to the prior: that is how ranks switch off. The
    KL of the scales, log-normal against half-Cauchy, is estimated at the step's own draw. Moments
    of w are over the scales, too: log t is Normal, so E g and E g² are one-dimensional integrals
    (Gauss-Hermite).
    """

    def __init__(self, model: FactorPrior) -> None:
        """As `normal`, behind gates that are nearly closed: tau = CLOSED · scale, lambda = 1."""
        super().__init__(model)
        self.scale = prior_scale(model.prior)
        self.sites = {site.name: site for site in model.sites}
        self.locs, self.scale_rhos = nn.ParameterDict(), nn.ParameterDict()
        rho_start = math.log(math.expm1(SPREAD))
        for site in model.sites:
            tau, local = torch.tensor(math.log(CLOSED * self.scale)), torch.zeros(site.rank_shape)
            for name, loc in ((f"{site.name}_global", tau), (f"{site.name}_local", local)):
                self.locs[name] = nn.Parameter(loc)
                self.scale_rhos[name] = nn.Parameter(torch.full_like(loc, rho_start))
        g = float(gate(torch.tensor(CLOSED), 1.0))
        with torch.no_grad():  # the noise of w is that of `normal`
            for rho in self.rhos.values():
                rho.copy_((softplus(rho) / g).expm1().log())

    def distribution(self, site: Site) -> dist.Distribution:
        """Q of a site given its two scales, which are sampled here."""
        tau, local = (self._sample_scale(f"{site.name}_{kind}") for kind in ("global", "local"))
        g = site.per_rank(gate(tau * local, self.scale))
        mean, sigma = g * self.means[site.name], g * softplus(self.rhos[site.name])
        return dist.Normal(mean, sigma, validate_args=False).to_event(2)

    def _sample_scale(self, name: str) -> Tensor:
        loc, sigma = self._log_scale(name)
        return pyro.sample(name, dist.LogNormal(loc, sigma).to_event(loc.dim()))

    def _log_scale(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of log tau or log lambda."""
        loc = self.locs[name] * (GAIN if name.endswith("_local") else 1.0)
        return loc, softplus(self.scale_rhos[name])

    @torch.no_grad()
    def gate_moments(self, site: Site) -> tuple[Tensor, Tensor]:
        """Mean and variance of a site's gates under q, each (modules, rank)."""
        (tau, sd_tau), (local, sd_local) = (
            self._log_scale(f"{site.name}_{kind}") for kind in ("global", "local")
        )
        loc, variance = tau + local, sd_tau**2 + sd_local**2
        log_t = loc[..., None] + variance.sqrt()[..., None] * NODES.to(loc.device)
        g, weights = gate(log_t.exp(), self.scale), WEIGHTS.to(loc.device)
        mean = g @ weights
        return mean, (g - mean[..., None]) ** 2 @ weights

    def shrinkage(self) -> dict[str, Tensor]:
        """Shrinkage factor 1 - E[g²] of every rank: site name -> (modules, rank)."""
        factors = {}
        for name, site in self.sites.items():
            mean, variance = self.gate_moments(site)
            factors[name] = 1 - (mean**2 + variance)
        return factors

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site: E[g] E[m]."""
        m = super().mean()
        return {
            name: site.per_rank(self.gate_moments(site)[0]) * m[name]
            for name, site in self.sites.items()
        }

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site: root of E[g²] Var[m] + Var[g] E[m]²."""
        m, sigma = super().mean(), super().stddev()
        stddevs = {}
        for name, site in self.sites.items():
            mean, variance = (site.per_rank(moment) for moment in self.gate_moments(site))
            squares = (mean**2 + variance) * sigma[name] ** 2 + variance * m[name] ** 2
            stddevs[name] = squares.sqrt()
        return stddevs
