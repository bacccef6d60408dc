"""Figures of a posterior by layer, in closed form or from a few draws at any size of model."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from blora_pyro.guides import latent_sites
from blora_pyro.guides.contracts import shrinkage_of
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import is_point, traces
from blora_pyro.posterior.spectra import effective_rank, spectra

NEAR_ZERO = 1e-3
KL_DRAWS = 16  # where there is no closed form


@dataclass(frozen=True)
class FactorSummary:
    """One factor, A or B, of one layer.

    Attributes:
        weights: Number of elements.
        contraction: Mean over the elements of 1 - Var_q / Var_p: 0 where the data said nothing, 1
            where they left no doubt. Where weights depend on one another it is that of their
            independent coordinates, as signal_to_noise, share_of_signal and prior_stddev are.
        signal_to_noise: Median of |mean| / sigma; infinite for a point.
        share_of_signal: Share of elements with |mean| > sigma.
        near_zero: Share of elements with |mean| < 1e-3.
        kl: KL(q || p) of these weights, nats, given the scales of a hierarchical prior; None for a
            point, whose KL is infinite, and where these scales are gone, as after pruning.
        active_ranks: Sum over the ranks of s² / scale², the horseshoe's effective number of ranks
            (Piironen and Vehtari, arXiv 1707.01694, eq. 2.4 ff.); None for other priors.
        prior_stddev: Root mean prior variance of a weight, the prior's scales averaged over.
    """

    module: str
    factor: str
    weights: int
    contraction: float
    signal_to_noise: float
    share_of_signal: float
    near_zero: float
    kl: float | None
    active_ranks: float | None
    prior_stddev: float


@dataclass(frozen=True)
class UpdateSummary:
    """ΔW = alpha/rank · B A of one layer, which does not depend on the basis of A and B.

    Attributes:
        norm: Frobenius norm of E ΔW.
        relative_norm: Its ratio to the norm of the frozen weight; None if that is not known.
        singular_values: Of E ΔW, falling.
        singular_stddevs: Posterior standard deviation of uᵢᵀ ΔW vᵢ, uᵢ and vᵢ the singular vectors
            of E ΔW: the spread of the singular values to first order.
        effective_rank: exp of the entropy of the singular values' shares (Roy, Vetterli 2007).
        directions: Number of singular values above their standard deviation.
    """

    module: str
    norm: float
    relative_norm: float | None
    singular_values: tuple[float, ...]
    singular_stddevs: tuple[float, ...]
    effective_rank: float
    directions: int


@dataclass(frozen=True)
class Summary:
    """A posterior in figures: prior and guide, two factors and one update a layer.

    `scales_kl` is the KL of the scales of a hierarchical prior by site, nats.
    """

    prior: str
    prior_args: dict[str, Any]
    guide: str
    rank: int
    factors: tuple[FactorSummary, ...]
    updates: tuple[UpdateSummary, ...]
    scales_kl: dict[str, float]

    @property
    def kl(self) -> float:
        """KL of all that is not a point, nats."""
        return sum(row.kl or 0.0 for row in self.factors) + sum(self.scales_kl.values())

    def kl_by_module(self) -> dict[str, tuple[float, int]]:
        """Return KL of A and B of every layer, nats, and their number of weights; no points."""
        totals: dict[str, tuple[float, int]] = {}
        for row in self.factors:
            if row.kl is not None:
                kl, weights = totals.get(row.module, (0.0, 0))
                totals[row.module] = kl + row.kl, weights + row.weights
        return totals

    @property
    def kl_floor(self) -> float | None:
        """KL that every weight pays wherever it is: the least mean of a layer, nats; no points."""
        totals = self.kl_by_module().values()
        return min((kl / weights for kl, weights in totals), default=None)


def summarise(posterior: Posterior) -> Summary:
    """Return the figures of a posterior.

    Raises:
        UserError: If its prior is code that has not been named.
    """
    variances = posterior.prior_variances()
    divergences = kl_by_site(posterior)
    shrinkage, moments = shrinkage_of(posterior.guide), posterior.independent
    factors = []
    for site in (site for group in posterior.groups for site in group.sites):
        kl, factor_shrinkage = divergences.pop(site.name), shrinkage.get(site.name)
        for i, module in enumerate(site.modules):
            mean = posterior.mean[site.name][i].cpu()
            own = moments.get(site.name)
            z, stddev = mean, posterior.stddev[site.name][i].cpu()
            if own is not None:
                z, stddev = own.mean[i].cpu(), own.stddev[i].cpu()
            variance = variances[site.name][i]
            ratio = torch.where(z == 0, 0.0, z.abs() / stddev)  # x / 0 is infinite
            active = None if factor_shrinkage is None else float((1 - factor_shrinkage[i]).sum())
            row = FactorSummary(
                module=module,
                factor=site.factor,
                weights=mean.numel(),
                contraction=1 - float((stddev**2 / variance).mean()),
                signal_to_noise=float(ratio.median()),
                share_of_signal=float((ratio > 1).float().mean()),
                near_zero=float((mean.abs() < NEAR_ZERO).float().mean()),
                kl=None if kl is None else float(kl[i]),
                active_ranks=active,
                prior_stddev=float(variance.mean()) ** 0.5,
            )
            factors.append(row)
    return Summary(
        prior=posterior.family.prior,
        prior_args=dict(posterior.family.prior_args),
        guide=posterior.family.guide,
        rank=posterior.rank,
        factors=tuple(factors),
        updates=summarise_updates(posterior),
        scales_kl={name: float(kl.sum()) for name, kl in divergences.items() if kl is not None},
    )


def kl_by_site(posterior: Posterior) -> dict[str, Tensor | None]:
    """Return KL(q || p) in nats: (modules,) for factors, a scalar for scales, None for points.

    It is closed-form where torch knows it, else log q - log p at draws. The KL of factors given the
    scales of a hierarchical prior is averaged over draws of the scales. All are None if the guide
    lacks these scales, as after pruning. Of `auto-lowrank` it is that of each element alone, to
    which the joint KL adds what the elements tell of one another.
    """
    guide: Any = posterior.guide
    totals: dict[str, Tensor | None] = {}
    count = 0
    for trace in traces(guide, KL_DRAWS):
        count += 1
        exact = True
        (prior,) = traces(poutine.replay(posterior.prior, trace=trace), 1)
        latent = latent_sites(trace)
        if latent_sites(prior).keys() != latent.keys():
            return dict.fromkeys(latent)
        for name, node in latent.items():
            q, p, value = node["fn"], prior.nodes[name]["fn"], node["value"]
            if is_point(trace, name):
                totals[name] = None
                continue
            if isinstance(q, dist.Delta):
                own = trace.nodes.get(f"{name}_unconstrained")
                normal = guide.marginal(name) if own is None else own["fn"]
                transform = biject_to(p.support)
                is_factor = name in posterior.mean
                q = normal if is_factor else dist.TransformedDistribution(normal, transform)
            with torch.no_grad():
                try:
                    kl = kl_divergence(q, p)
                except NotImplementedError:
                    kl, exact = q.log_prob(value) - p.log_prob(value), False
                before = totals.get(name)
                totals[name] = kl if before is None else before + kl
            exact &= name in posterior.mean
        if exact:
            break
    return {name: None if total is None else total / count for name, total in totals.items()}


def summarise_updates(posterior: Posterior) -> tuple[UpdateSummary, ...]:
    """Return the figures of every update, for which no prior is needed."""
    rows = []
    for group, spectrum in zip(posterior.groups, spectra(posterior).values(), strict=True):
        norms = spectrum.values.norm(dim=-1).tolist()
        ranks = effective_rank(spectrum.values).tolist()
        size = (group.out_features * group.in_features) ** 0.5
        for i, module in enumerate(group.modules):
            stddev = group.weight_stddevs[i] if group.weight_stddevs else None
            row = UpdateSummary(
                module=module,
                norm=norms[i],
                relative_norm=norms[i] / (stddev * size) if stddev else None,
                singular_values=tuple(spectrum.values[i].tolist()),
                singular_stddevs=tuple(spectrum.stddevs[i].tolist()),
                effective_rank=ranks[i],
                directions=int((spectrum.values[i] > spectrum.stddevs[i]).sum()),
            )
            rows.append(row)
    return tuple(rows)
