"""The fitted posterior: draws, mean, sparsity, and a net adapted by them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xarray
from torch import Tensor, nn

from blora_pyro.adapters import Adapters, Group, scalings_of
from blora_pyro.data import Examples
from blora_pyro.errors import UserError
from blora_pyro.families import NO_PRIOR
from blora_pyro.files import check_name
from blora_pyro.guides import Guide, latent_sites
from blora_pyro.guides.contracts import Independent, TensorPrior, independent_of
from blora_pyro.hub import find_run
from blora_pyro.metrics import sparsity
from blora_pyro.models import Base, BLoRA, FactorPrior, PooledBLoRA, Pooling
from blora_pyro.models.base import map_languages
from blora_pyro.models.encoder import first_adapted
from blora_pyro.models.logits import allow, allowing
from blora_pyro.posterior.draws import point_scales, prior_variances, traces
from blora_pyro.posterior.family import Family, normal_guide
from blora_pyro.posterior.inference_data import prediction_groups, to_inference_data
from blora_pyro.posterior.storage import (
    DOMAIN_FOLDERS,
    POSTERIOR_FILE,
    read_posterior,
    write_adapter,
    write_posterior,
)
from blora_pyro.tables import (
    Part,
    Table,
    described,
    described_html,
    figure_columns,
    text_columns,
)


class Weakened(NamedTuple):
    """What `strength.at_strength` by `base` has made of a fit, and what the fit has in its place.

    Attributes:
        strength: The strength.
        mean: The fit's, as the next three; see `Posterior`.
        stddev: Likewise.
        state: Likewise.
        prior_tensors: Likewise.
    """

    strength: float
    mean: Mapping[str, Tensor]
    stddev: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    prior_tensors: Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class Posterior:
    """A fitted posterior over the stacked factors A and B.

    Attributes:
        base: Name of the base model.
        groups: Target layers by shape.
        alpha: Updates are scaled by alpha / rank, times a group's relative scaling.
        mean: Site name -> posterior mean, of the site's shape: (modules, rank, in_features) for
            `A_...`, (modules, out_features, rank) for `B_...`.
        stddev: Site name -> posterior standard deviation, likewise.
        family: The prior and the guide.
        state: The guide's parameters, by the names of its `state_dict`.
        revision: Revision of the base model, if the fit pinned one.
        prior_tensors: Tensors that the prior depends on, see `guides.contracts.TensorPrior`.
        pooling: Layout of a fit to several domains with factors of their own: groups, moments,
            prior and guide then cover all rows (see `models.pooling`), and `for_domain` gives the
            posterior that can be applied to a net. None for any other fit.
        unsuppressed: Tokens that the training texts hold although the base's generation config
            suppresses them: a net that is adapted, or merged, may say them.
        language_map: What prompted languages that the base has no token for, see
            `languages.prompt_codes`; a net that is merged keeps it.
        fitted_alpha: The fit's own alpha, where `alpha` is that of another strength; None where it
            is the same. See `strength.at_strength`, which sets both.
        weakened: The fit, where A is that of another strength by `base`; None of any other.
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
    unsuppressed: tuple[int, ...] = ()
    language_map: Mapping[str, str] = field(default_factory=dict)
    fitted_alpha: float | None = None
    weakened: Weakened | None = None

    @classmethod
    def from_guide(
        cls,
        base: str,
        model: BLoRA,
        guide: Guide,
        family: Family,
        revision: str | None = None,
        unsuppressed: tuple[int, ...] = (),
        language_map: Mapping[str, str] | None = None,
    ) -> "Posterior":
        """The posterior that `guide` holds now."""
        assert isinstance(guide, torch.nn.Module)
        state = {name: value.detach() for name, value in guide.state_dict().items()}
        moments = guide.mean(), guide.stddev()
        prior = model.prior
        tensors = prior.tensors if isinstance(prior, TensorPrior) else {}
        pooling = model.pooling if isinstance(model, PooledBLoRA) else None
        groups, alpha = model.groups, model.alpha
        posterior = cls(
            base, groups, alpha, *moments, family, state, revision, tensors, pooling, unsuppressed
        )
        return replace(posterior, language_map=dict(language_map or {}))

    @property
    def _facts(self) -> dict[str, object]:
        arguments = ", ".join(f"{name} {one}" for name, one in self.family.prior_args.items())
        layers = sum(len(group.modules) for group in self.groups)
        facts: dict[str, object] = {
            "base": self.base + (f" at {self.revision}" if self.revision else ""),
            "prior": self.family.prior + (f" ({arguments})" if arguments else ""),
            "guide": self.family.guide,
            "adapter": f"{self.num_weights:,} weights in {layers} layers, rank {self.rank}",
        }
        if self.pooling is not None:
            facts["domains"] = ", ".join(self.pooling.domains)
        return facts if self.strength == 1 else {**facts, "strength": f"{self.strength:g}"}

    def __repr__(self) -> str:
        """Tell of base, family and size in a few lines, without the tensors."""
        return described("Posterior", self._facts)

    def _repr_html_(self) -> str:
        """Tell the same in a notebook, with sections that can be opened."""
        names = [", ".join(group.modules) for group in self.groups]
        sections: dict[str, Sequence[Part]] = {"Layers by shape": self.layer_tables()}
        return described_html("Posterior", self._facts, {**sections, "Names of layers": names})

    def layer_tables(self) -> list[Part]:
        """Return a table of the layers by shape, with their sites."""
        columns = [
            *text_columns("sites"),
            *figure_columns("layers", "rank", "out", "in", "scaling"),
        ]
        table, scalings = Table(columns), self.scalings
        for group in self.groups:
            sizes = len(group.modules), group.rank, group.out_features, group.in_features
            table.add_row(f"{group.A.name}, {group.B.name}", *sizes, f"{scalings[group.key]:g}")
        return [table]

    def for_domain(self, domain: str | None = None) -> "Posterior":
        """The posterior of one domain's factors, or of the part that all domains share.

        Element by element a Normal with the moments of `Pooling.moments`. This is exact, because
        the guides that can be pooled are mean-field Normals or points. The result has no prior.

        None is the shared part, which serves data of new domains. A posterior without domains takes
        None only and is returned as it is.

        Raises:
            UserError: If the domain is unknown, or nothing is shared.
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
        """The prior as a Pyro program over all factors: `posterior.prior()` draws from it.

        Raises:
            UserError: If the prior is a user's file that has not been named, or if there is none,
                as after combining runs.
        """
        return self.family.build_prior(self.groups, self.prior_tensors)

    @cached_property
    def guide(self) -> Guide:
        """The fitted guide, a Pyro program: `posterior.guide()` draws from q.

        Without `state`, as after pruning, it is independent Normals with `mean` and `stddev`.

        Raises:
            UserError: If the guide is a user's file that has not been named, or that has changed.
        """
        if not self.state:
            return normal_guide(self.groups, self.mean, self.stddev)
        return self.family.build_guide(self.prior, self.state)

    def point_scales(self) -> dict[str, Tensor]:
        """Scales of a hierarchical prior that the guide fits as points, by site name."""
        return point_scales(self.guide, self.mean)

    @cached_property
    def independent(self) -> dict[str, Independent]:
        """Independent coordinates of the sites whose weights depend on one another under q.

        Empty for nearly all guides, after pruning, and for a user's prior that has not been named.
        """
        if not (self.state and self.prior_tensors) or not self.family.is_usable:
            return {}
        return independent_of(self.guide)

    def prior_variances(self) -> dict[str, Tensor]:
        """Prior variance of every weight by site, or of its `independent` coordinates.

        See `draws.prior_variances`.

        Raises:
            UserError: See `prior`.
        """
        return prior_variances(self.prior, self.point_scales(), self.mean, self.independent)

    @property
    def rank(self) -> int:
        """Largest rank of an update; without pruning all ranks are equal."""
        return max(group.rank for group in self.groups)

    @property
    def scaling(self) -> float:
        """Alpha / rank; `scalings` has a group's own."""
        return self.alpha / self.rank

    @property
    def scalings(self) -> dict[str, float]:
        """The factor s in ΔW = s · B A, by group key."""
        return scalings_of(self.groups, self.alpha)

    @property
    def strength(self) -> float:
        """The strength, see `strength.at_strength`: 1 is the fit, 0 the base."""
        if self.weakened is not None:
            return self.weakened.strength
        return 1.0 if self.fitted_alpha is None else round(self.alpha / self.fitted_alpha, 12)

    def with_weaker(
        self, strength: float, mean: Mapping[str, Tensor], stddev: Mapping[str, Tensor]
    ) -> "Posterior":
        """The posterior with moments of other A; the guide is then one of independent Normals."""
        own = Weakened(strength, self.mean, self.stddev, self.state, self.prior_tensors)
        means, deviations = {**self.mean, **mean}, {**self.stddev, **stddev}
        return replace(
            self, mean=means, stddev=deviations, state={}, prior_tensors={}, weakened=own
        )

    @property
    def num_weights(self) -> int:
        """Number of adapter weights: all elements of A and B."""
        return sum(mean.numel() for mean in self.mean.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of layers, alpha, means and deviations."""
        groups = [group.to_json() for group in self.groups]
        total = sha256(json.dumps([groups, self.alpha]).encode())
        tensors = {f"{name}.mean": value for name, value in self.mean.items()}
        tensors |= {f"{name}.stddev": value for name, value in self.stddev.items()}
        for name, value in sorted(tensors.items()):
            total.update(f"{name} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().numpy().data)
        return total.hexdigest()

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
        base: Base | None = None,
        examples: Examples | None = None,
    ) -> Any:
        """Draws as `arviz.InferenceData` (ArviZ 0.23) or `xarray.DataTree` (1.x).

        Groups `posterior` and `prior` have one variable per site: (chain, draw, module, rank,
        in_feature) for A, (chain, draw, module, out_feature, rank) for B, and the scales of a
        hierarchical prior. Group `sample_stats` has `log_guide` and `log_prior`, the log-densities
        of each draw over all sites. There is one chain, because the draws of a variational fit are
        independent. Where the chosen sites differ along a dimension, its name ends in the layers'
        shape (`module_192x768`).

        With `base` and `examples` there are groups of `tokens`, at the same draws: `log_likelihood`
        (chain, draw, utterance), log p(tokens | audio) in nats, for `az.loo` and `az.compare`;
        `posterior_predictive` (chain, draw, utterance, position), a draw of every target token
        after the true ones before it; and `observed_data`; padded with -100. `az.loo` takes a
        posterior's temperature T as 1: of one fitted at another it leaves out a share T of an
        utterance (`blora-pyro diagnose --khat` leaves out all of it).

        Args:
            draws: Number of draws.
            sites: Site names; None for all.
            modules: Layers as in `find_targets`, comma-separated suffixes or a regex; None for all.
            seed: Seed of the draws.
            max_bytes: Largest size to build, without what is predicted.
            base: The base model, for `examples`.
            examples: Utterances, see `load_examples`.

        Raises:
            UserError: If the size exceeds `max_bytes`, a site or layer is unknown, one of `base`
                and `examples` is missing, or see `guide`.
        """
        attrs = {
            "inference_library": "blora-pyro",
            "prior": self.family.prior,
            "prior_args": json.dumps(dict(self.family.prior_args)),
            "guide": self.family.guide,
        }

        def predicted() -> Mapping[str, xarray.Dataset]:
            if base is None or examples is None:
                return {}
            found = ({name: draw[name] for name in self.mean} for draw in self.draws(draws, seed))
            in_place = (self.applied(base.net, factors) for factors in found)
            return prediction_groups(in_place, base, examples, seed)

        if (base is None) != (examples is None):
            raise UserError("base and examples belong together; give both, or none")
        about = self.guide, self.prior, self.groups, attrs, draws, sites, modules, seed, max_bytes
        return to_inference_data(*about, predicted)

    def layer_means(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer name, A (rank, in_features), B (out_features, rank)) at the posterior mean."""
        for group in self.groups:
            stacks = self.mean[group.A.name], self.mean[group.B.name]
            yield from zip(group.modules, *stacks, strict=True)

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(layer name, ΔW = s · E[B] E[A] (out_features, in_features)), one at a time."""
        scalings = self.scalings
        own = [scalings[group.key] for group in self.groups for _ in group.modules]
        for scaling, (name, a, b) in zip(own, self.layer_means(), strict=True):
            yield name, scaling * (b @ a)

    def sparsity(self, threshold: float = 1e-3) -> dict[str, float]:
        """Share of elements with `|w| < threshold` at the posterior mean, for `A`, `B`, `delta_w`.

        For several domains it is that of the shared part, or if nothing is shared, of all adapters.
        """
        if self.pooling is not None and self.pooling.is_shared:
            return self.for_domain().sparsity(threshold)
        shares = {
            factor: sparsity([w.cpu() for n, w in self.mean.items() if n[0] == factor], threshold)
            for factor in ("A", "B")
        }
        deltas = (delta.cpu() for _, delta in self.delta_weights())
        return shares | {"delta_w": sparsity(deltas, threshold)}

    @contextmanager
    def applied(
        self, net: nn.Module, factors: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Adapt `net` by the posterior mean, or by `factors` (a draw), inside a `with`.

        Raises:
            UserError: If the net lacks the layers, or the posterior has several domains.
        """
        self._check_one()
        adapters = Adapters(net, self.groups, self.alpha)
        device = next(net.parameters()).device
        placed = {name: value.to(device) for name, value in (factors or self.mean).items()}
        try:
            with adapters.using(placed), allowing(net, self.unsuppressed):
                yield
        finally:
            adapters.remove()

    def leaves_encoder(self, net: Any) -> bool:
        """Return whether the encoder of `net`, a Whisper, stays as it is."""
        modules = (name for group in self.groups for name in group.modules)
        return first_adapted(net, modules) == net.config.encoder_layers

    @torch.no_grad()
    def merge(self, net: nn.Module) -> None:
        """Add ΔW of the posterior mean to the weights of `net`: inference then costs nothing extra.

        Raises:
            UserError: If the net lacks the layers, or the posterior has several domains.
        """
        self._check_one()
        Adapters(net, self.groups, self.alpha).remove()  # checks names and shapes
        for name, delta in self.delta_weights():
            weight = net.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() + delta.to(weight.device))
        allow(net, self.unsuppressed)
        map_languages(net, self.language_map)

    def save(self, folder: Path) -> None:
        """Write `posterior.safetensors`, and the mean as a PEFT adapter next to it.

        For several domains the adapter is that of the shared part, if there is one, and each
        domain's own goes to `domains/NAME`.

        Raises:
            UserError: If a domain's name can be no part of a path.
        """
        folder.mkdir(parents=True, exist_ok=True)
        attributes = {field.name: getattr(self, field.name) for field in fields(self)}
        write_posterior(attributes, folder / POSTERIOR_FILE)
        adapters = {}
        if self.pooling is None or self.pooling.is_shared:
            adapters[folder] = self.for_domain()
        for name in self.pooling.domains if self.pooling else ():
            place = folder / DOMAIN_FOLDERS / check_name(name, "a domain")
            adapters[place] = self.for_domain(name)
        for place, one in adapters.items():
            means = one.layer_means()
            about = self.base, self.revision, self.language_map, self.unsuppressed
            write_adapter(place, one.groups, one.alpha, means, *about)

    @classmethod
    def load(
        cls, folder: Path | str, prior: str | None = None, trust_prior_file: bool = False
    ) -> "Posterior":
        """Read `posterior.safetensors` of a run folder, or of a run `OWNER/NAME[@REVISION]`.

        Without its code a run with a user's own prior has no draws and no densities. It is run only
        if it is named here, by `prior`, or trusted as the run names it; and only if it is the file
        that the run was fitted with, by its SHA-256.

        Args:
            folder: Folder of the run, or its Hub id.
            prior: File of the user's own prior.
            trust_prior_file: Run the files that the run names.

        Raises:
            UserError: If there is no such file, it is damaged, or the prior's is another.
        """
        path = find_run(folder) / POSTERIOR_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} is no run folder (no {POSTERIOR_FILE}); give the --output of a fit"
            )
        attributes = read_posterior(path, prior)
        weaker = attributes.pop("weaker")
        read = cls(**attributes)
        read = replace(read, family=read.family.trusted()) if trust_prior_file else read
        return read if weaker is None else read.with_weaker(*weaker)
