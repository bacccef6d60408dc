"""Several domains in one program: factors shared by all of them, and deviations of each.

With factors w (A or B) of a layer, A_d and B_d those of domain d of D:

    complete      w_d = w,               w ~ prior            one adapter for the union of all data
    none          w_d ~ prior                                 D adapters that know nothing of others
    hierarchical  w_d = w_0 + tau z_d,   w_0, z_d ~ prior     D adapters around a shared one

The last is partial pooling (Gelman and Hill, Data Analysis Using Regression and
Multilevel/Hierarchical Models, 2007, chapter 12): a domain with little data stays near what all
have in common, one with much goes its own way. It is written non-centred (Papaspiliopoulos,
Roberts and Sköld, A General Framework for the Parametrization of Hierarchical Models, Statistical
Science 22, 2007, arXiv 0708.3797): w_0 and z_d are independent a priori, as the mean-field guides
take them to be, while w_d given w_0 is as narrow as tau makes it. For the normal prior of deviation
s it is w_d ~ Normal(w_0, (tau s)²), and tau -> 0 is complete pooling. It also scales a step of
Adam: w_d - w_0 moves tau times as fast as w_0.

w_0 and z_d have one prior, so all of them are rows of the one stacked site that the program has
anyway: the first M of the (1 + D) M rows are the shared layers, then come M for each domain. No
prior, guide or KL has to know of domains, and there are no more sites than without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Group
from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.models.whisper import BLoRA, Density
from blora_pyro.options import POOLING_SCALE, FitConfig

T = TypeVar("T")
_OF = "@"  # between a layer's name and its domain's


@dataclass(frozen=True)
class Pooling:
    """How the factors of several domains come from the rows of the stacked sites.

    Attributes:
        kind: `hierarchical` or `none`, see above.
        domains: Their names, in the order of the data's sources.
        scale: tau, the width of a domain's deviations in units of the prior's own width; `none` has
            no use for it.
    """

    kind: Literal["hierarchical", "none"]
    domains: tuple[str, ...]
    scale: float = POOLING_SCALE

    @property
    def is_shared(self) -> bool:
        """Whether the first rows are a part that all domains share."""
        return self.kind == "hierarchical"

    @property
    def parts(self) -> int:
        """How often a layer is among the rows."""
        return self.is_shared + len(self.domains)

    def stack(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """Return the groups whose sites hold all parts: layers `layer`, then `layer@domain`."""
        endings = [*([""] if self.is_shared else []), *(_OF + name for name in self.domains)]
        return tuple(
            replace(
                group,
                modules=tuple(name + ending for ending in endings for name in group.modules),
                weight_stddevs=group.weight_stddevs * self.parts,
            )
            for group in groups
        )

    def unstack(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """Return the target layers by shape, of which `stack` made these groups."""

        def first(values: tuple[T, ...]) -> tuple[T, ...]:
            return values[: len(values) // self.parts]

        return tuple(
            replace(
                group,
                modules=tuple(name.partition(_OF)[0] for name in first(group.modules)),
                weight_stddevs=first(group.weight_stddevs),
            )
            for group in groups
        )

    def factors(self, stacked: Tensor, indices: Tensor) -> Tensor:
        """Return w_d of the domains of some indices (n,), as (n, modules, rows, columns).

        `stacked` is a draw, or the mean, of a site: (parts · modules, rows, columns).
        """
        parts = stacked.unflatten(0, (self.parts, -1))
        if not self.is_shared:
            return parts[indices]
        return parts[0] + self.scale * parts[1 + indices]

    def shared(self, stacked: Tensor) -> Tensor:
        """Return w_0, (modules, rows, columns), which is for unknown domains; else UserError."""
        self.index_of(None)
        return stacked.unflatten(0, (self.parts, -1))[0]

    def index_of(self, domain: str | None) -> int | None:
        """Return the index of a domain; None for the shared part, `domain` None.

        Raises:
            UserError: If there is no such domain, or no shared part.
        """
        known = ", ".join(self.domains)
        if domain is None and not self.is_shared:
            raise UserError(
                f"the run was fitted with pooling none: each of its domains ({known}) has an "
                "adapter of its own, and they share none; name the domain, with --domain"
            )
        if domain is not None and domain not in self.domains:
            raise UserError(f"domain is '{domain}'; give one of: {known}")
        return None if domain is None else self.domains.index(domain)

    def moments(self, mean: Tensor, stddev: Tensor, domain: str | None) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of w_d under q, or of w_0, each (modules, rows, columns).

        Given are those of the stacked site. The rows of q are independent, so Var w_d = Var w_0 +
        tau² Var z_d. Raises UserError as `index_of` does.
        """
        index = self.index_of(domain)
        if index is None:
            return self.shared(mean), self.shared(stddev)
        indices = torch.tensor([index])
        variance = replace(self, scale=self.scale**2).factors(stddev**2, indices)
        return self.factors(mean, indices)[0], variance[0].sqrt()

    @torch.no_grad()
    def start(self, guide: Any) -> None:
        """Set the deviations of a new guide to E z_d = 0, so that all domains start as one."""
        if self.is_shared:
            for mean in guide.means.values():
                mean.unflatten(0, (self.parts, -1))[1:] = 0


def pooling_of(config: FitConfig) -> Pooling | None:
    """Return how a configuration pools its domains; None for complete pooling."""
    if config.pooling is None or config.pooling == "complete":
        return None
    return Pooling(config.pooling, tuple(config.domains), config.pooling_scale or POOLING_SCALE)


class PooledBLoRA(BLoRA):
    """BLoRA over several domains: every utterance of a batch is computed with its own's factors.

    The sites are those of `pooling.stack`; the KL counts every row once, the shared ones, too. The
    loss is the mean over all target tokens, whoever's they are. So with `none` and beta = T/N the
    gradient of a domain with N_d of the N tokens is N_d/N times that of a fit on it alone with
    beta = T/N_d, at the same temperature.

    `batch.sources` has the index in `pooling.domains` of every utterance's domain. A batch without
    it is of an unknown domain, and gets the shared part.
    """

    def __init__(
        self,
        net: WhisperForConditionalGeneration,
        prior: Density,
        pooling: Pooling,
        **options: Any,
    ) -> None:
        """Freeze `net` and stack the factors of all domains.

        `prior` is that of every row and must not depend on other rows; `options` are of `BLoRA`.
        """
        super().__init__(net, prior, **options)
        self.pooling = pooling
        self.groups = pooling.stack(self.groups)

    def place(self, factors: Mapping[str, Tensor], batch: Batch) -> None:
        """Put the factors of the batch's domains in place.

        Raises:
            UserError: If the batch is of an unknown domain, and nothing is shared.
        """
        if batch.sources is None:
            self.adapters.put({name: self.pooling.shared(w) for name, w in factors.items()})
            return
        indices, rows = batch.sources.unique(return_inverse=True)
        of_domains = {name: self.pooling.factors(w, indices) for name, w in factors.items()}
        if len(indices) > 1:
            self.adapters.put(of_domains, rows)
        else:  # without rows, which is faster
            self.adapters.put({name: w[0] for name, w in of_domains.items()})
