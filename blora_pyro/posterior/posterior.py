"""The fitted posterior: draws, mean, sparsity, and what it is applied to."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from blora_pyro.adapters import Adapters, Group
from blora_pyro.errors import UserError
from blora_pyro.guides import Guide, build_guide, build_prior, latent_sites, previous_posterior
from blora_pyro.hub import find_run
from blora_pyro.metrics import sparsity
from blora_pyro.models import BLoRA, FactorPrior, PooledBLoRA, Pooling
from blora_pyro.posterior.draws import (
    point_scales,
    prior_variances,
    to_inference_data,
    traces,
)
from blora_pyro.posterior.families import NO_PRIOR, Family
from blora_pyro.posterior.peft_export import save_adapter
from blora_pyro.posterior.storage import DOMAINS, FILE, read_posterior, write_posterior


@dataclass(frozen=True)
class Posterior:
    """A fitted posterior over the stacked factors A and B.

    Attributes:
        base: Name of the base model that it was fitted on.
        groups: Target layers by shape.
        alpha: Updates are scaled by alpha / rank.
        mean: Site name -> posterior mean, of the site's shape: (modules, rank, in_features) for
            `A_...`, (modules, out_features, rank) for `B_...`.
        stddev: Site name -> posterior standard deviation, likewise.
        family: The prior and the guide.
        state: The guide's parameters, by the names of its `state_dict`.
        revision: Of the base model, if it was fitted on a certain one.
        prior_tensors: Of the prior, if that is an earlier posterior: see `previous_posterior`.
        pooling: Of a fit to several domains with factors of their own: groups, moments, prior and
            guide are then those of all rows (see `models.pooling`), and `for_domain` gives the
            posterior that a net can take. None for any other.
    """

    base: str
    groups: tuple[Group, ...]
    alpha: float
    mean: Mapping[str, Tensor]
    stddev: Mapping[str, Tensor]
    family: Family = field(default_factory=Family)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    revision: str | None = None
    prior_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    pooling: Pooling | None = None

    @classmethod
    def of(
        cls, base: str, model: BLoRA, guide: Guide, family: Family, revision: str | None = None
    ) -> "Posterior":
        """What `guide` holds now."""
        assert isinstance(guide, torch.nn.Module)
        state = {name: value.detach() for name, value in guide.state_dict().items()}
        moments = guide.mean(), guide.stddev()
        prior = model.prior
        tensors = prior.tensors if isinstance(prior, previous_posterior.Prior) else {}
        pooling = model.pooling if isinstance(model, PooledBLoRA) else None
        groups, alpha = model.groups, model.alpha
        return cls(base, groups, alpha, *moments, family, state, revision, tensors, pooling)

    def for_domain(self, domain: str | None = None) -> "Posterior":
        """The posterior of one domain's factors, or of what all domains share.

        Element by element a Normal with the moments of `Pooling.moments`, which is exact, for the
        guides that can be pooled are mean-field Normal or points. Its prior is not carried on.

        Args:
            domain: None is the shared part, for data of a domain that was not among them; and all
                that there is of a posterior without domains.

        Raises:
            UserError: If there is no such domain, or nothing is shared.
        """
        if self.pooling is None:
            if domain is not None:
                raise UserError(
                    f"domain is '{domain}', and the run has one adapter for all its data; leave "
                    "domain out"
                )
            return self
        found = {
            name: self.pooling.moments(mean, self.stddev[name], domain)
            for name, mean in self.mean.items()
        }
        return replace(
            self,
            groups=self.pooling.unstack(self.groups),
            mean={name: mean for name, (mean, _) in found.items()},
            stddev={name: stddev for name, (_, stddev) in found.items()},
            family=Family(prior=NO_PRIOR),
            state={},
            pooling=None,
        )

    def _check_one(self) -> None:
        if self.pooling is not None:
            known = ", ".join(self.pooling.domains)
            raise UserError(f"the posterior has several domains ({known}); choose by for_domain")

    @cached_property
    def prior(self) -> FactorPrior:
        """The prior as a Pyro program of all factors: `posterior.prior()` draws from it.

        Raises:
            UserError: If it is in a user's file that has not been named, or is gone with the basis
                that it was in (an earlier posterior, after pruning).
        """
        if self.family.files and not self.family.runs_code:
            files = " and ".join(self.family.files)
            raise UserError(f"the run's prior is code, in {files}; name it with --prior to run it")
        if self.family.prior == NO_PRIOR:
            raise UserError(
                "the adapter is combined of several runs, or part of one, and has no prior; give a "
                "run"
            )
        arguments = self.family.prior_args
        if self.family.prior != previous_posterior.NAME:
            density = build_prior(self.family.prior, **arguments)
        elif self.prior_tensors:
            density = previous_posterior.Prior(self.groups, self.prior_tensors, **arguments)
        else:
            raise UserError(
                "the adapter was turned away from its prior, an earlier posterior (by pruning, or "
                "a strength by signal-to-noise); give the run itself"
            )
        return FactorPrior(self.groups, density, torch.device("cpu"))

    @cached_property
    def guide(self) -> Guide:
        """The fitted guide, a Pyro program: `posterior.guide()` draws from q.

        Without `state` (after pruning) it is independent Normals of the mean and deviation.

        Raises:
            UserError: If it is in a user's file that has not been named, or that file has changed.
        """
        with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            if not self.state:
                return self._moments_guide()
            guide = build_guide(self.family.guide, self.prior)
            guide()  # Pyro's own guides make their parameters here
        assert isinstance(guide, torch.nn.Module)
        try:
            guide.load_state_dict(dict(self.state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"guide {self.family.guide} is not the fitted one: {reason}") from None
        return guide

    def _moments_guide(self) -> Guide:
        program = FactorPrior(self.groups, build_prior("normal"), torch.device("cpu"))
        guide: Any = build_guide("normal", program)
        previous_posterior.start_at(guide, self.mean, self.stddev)
        return guide

    def point_scales(self) -> dict[str, Tensor]:
        """Scales of a hierarchical prior that the guide fits as points, by site name."""
        return point_scales(self.guide, self.mean)

    def prior_variances(self) -> dict[str, Tensor]:
        """Prior variance of every weight by site; see `draws.prior_variances`.

        Raises:
            UserError: See `prior`.
        """
        return prior_variances(self.prior, self.point_scales(), self.mean)

    @property
    def rank(self) -> int:
        """Rank of every update, or the largest."""
        return max(group.rank for group in self.groups)

    @property
    def scaling(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    @property
    def num_weights(self) -> int:
        """Number of adapter weights: elements of all A and B."""
        return sum(mean.numel() for mean in self.mean.values())

    def draws(self, count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """`count` independent draws from q, one at a time: site name -> tensor.

        Factors have their site's shape; the scales of a hierarchical prior are among the sites.

        Raises:
            UserError: See `guide`.
        """
        for trace in traces(self.guide, count, seed):
            yield {name: site["value"] for name, site in latent_sites(trace).items()}

    def to_arviz(
        self,
        draws: int = 200,
        sites: Sequence[str] | None = None,
        modules: str | None = None,
        seed: int = 0,
        max_bytes: int = 2**30,
    ) -> Any:
        """Draws as `arviz.InferenceData` (ArviZ 0.23) or `xarray.DataTree` (1.x).

        Groups `posterior` and `prior`: a variable a site, (chain, draw, module, rank, in_feature)
        for A and (chain, draw, module, out_feature, rank) for B; the scales of a hierarchical prior
        are variables, too. Group `sample_stats`: `log_guide` and `log_prior`, the log-densities of
        each draw, all sites together. One chain: the draws of a variational fit are independent.
        Where the chosen sites differ along a dimension, the layers' shape follows its name
        (`module_192x768`). `inference_data.save_inference_data` writes netCDF or zarr.

        Args:
            draws: Number of draws.
            sites: Site names; None is all.
            modules: Layers, as in `find_targets`: suffixes with commas between, or a regex; None is
                all.
            seed: Of the draws.
            max_bytes: Refuse to build more than this.

        Raises:
            UserError: If that is too much, there is no such site or layer, or see `guide`.
        """
        attrs = {
            "inference_library": "blora-pyro",
            "prior": self.family.prior,
            "prior_args": json.dumps(dict(self.family.prior_args)),
            "guide": self.family.guide,
        }
        return to_inference_data(
            self.guide,
            self.prior,
            self.groups,
            draws=draws,
            sites=sites,
            modules=modules,
            seed=seed,
            max_bytes=max_bytes,
            attrs=attrs,
        )

    def layer_means(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer name, A (rank, in_features), B (out_features, rank)) at the posterior mean."""
        for group in self.groups:
            stacks = self.mean[group.A.name], self.mean[group.B.name]
            yield from zip(group.modules, *stacks, strict=True)

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(layer name, ΔW = alpha/rank · E[B] E[A] (out_features, in_features)), one at a time."""
        for name, a, b in self.layer_means():
            yield name, self.scaling * (b @ a)

    def sparsity(self, threshold: float = 1e-3) -> dict[str, float]:
        """Share of elements with |w| < threshold at the posterior mean, for `A`, `B`, `delta_w`.

        Of several domains: of what they share, or if that is nothing, of all their adapters.
        """
        if self.pooling is not None and self.pooling.is_shared:
            return self.for_domain().sparsity(threshold)
        parts: dict[str, list[Tensor]] = {"A": [], "B": []}
        for name, mean in self.mean.items():
            parts[name[0]].append(mean.cpu())
        return {
            **{factor: sparsity(means, threshold) for factor, means in parts.items()},
            "delta_w": sparsity((delta.cpu() for _, delta in self.delta_weights()), threshold),
        }

    @contextmanager
    def applied(
        self, net: nn.Module, factors: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """`net` adapted by the posterior mean, or by `factors` (a draw), inside a `with`.

        Raises:
            UserError: If the net lacks the layers, or this is of several domains.
        """
        self._check_one()
        adapters = Adapters(net, self.groups, self.alpha)
        device = next(net.parameters()).device
        placed = {name: value.to(device) for name, value in (factors or self.mean).items()}
        try:
            with adapters.using(placed):
                yield
        finally:
            adapters.remove()

    @torch.no_grad()
    def merge(self, net: nn.Module) -> None:
        """Add ΔW of the posterior mean to the weights of `net`: no inference cost from then on.

        Raises:
            UserError: If the net lacks the layers, or this is of several domains.
        """
        self._check_one()
        Adapters(net, self.groups, self.alpha).remove()  # checks names and shapes
        for name, delta in self.delta_weights():
            weight = net.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() + delta.to(weight.device))

    def save(self, folder: Path) -> None:
        """Write `posterior.safetensors`, and the mean as a PEFT adapter beside it.

        Of several domains what they share is the adapter beside it, if they do, and each one's own
        is in `domains/NAME`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_posterior(self, folder / FILE)
        if self.pooling is None:
            return save_adapter(self, folder)
        if self.pooling.is_shared:
            save_adapter(self.for_domain(), folder)
        for name in self.pooling.domains:
            save_adapter(self.for_domain(name), folder / DOMAINS / name)

    @classmethod
    def load(cls, folder: Path | str, prior: str | None = None) -> "Posterior":
        """Read `posterior.safetensors` of a run folder, or of a run on the Hub.

        Args:
            folder: A run folder, or `OWNER/NAME[@REVISION]`, see `find_run`.
            prior: The file of the prior, for a run that was fitted with a user's own: its code is
                run only where it is named. Without it draws and densities are not to be had.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        path = find_run(folder) / FILE
        if not path.is_file():
            raise UserError(f"{folder} is no run folder (no {FILE}); give the --output of a fit")
        return cls(**read_posterior(path, prior))
