"""The interfaces of priors and guides.

Every family has `Prior` and `Guide`; the other protocols are optional, found by `isinstance`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro.distributions as dist
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Site
from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.models import FactorPrior


class Prior(Protocol):
    """The density of the low-rank factors, called once for every site."""

    def __call__(self, site: Site) -> dist.Distribution:
        """p(w) of batch shape (modules,) and event shape (rows, columns), of `site.shape` together.

        A hierarchical prior samples its scales first, by `pyro.sample` with names that begin with
        `site.name` and with event dimensions only. Tensors are to be made on torch's current
        default device.
        """


@runtime_checkable
class TensorPrior(Prior, Protocol):
    """A prior that depends on tensors, which are stored with the posterior.

    Attributes:
        tensors: Name -> tensor. The library sets it when a posterior is loaded, on the CPU.
    """

    tensors: Mapping[str, Tensor]


@runtime_checkable
class PreparedPrior(TensorPrior, Protocol):
    """A prior that needs statistics of the frozen base.

    `prepare` runs once before the first step and its result becomes `tensors`, on the base's
    device. A fit that is resumed runs it again, with the same random numbers. If the prior has an
    attribute `modules`, it is set to the names of the adapted layers before that; an argument
    `languages` has the backward sets', with commas, by default. With an attribute `statistics` that
    is `backward` it gets batches of the backward sets' train (or else dev) splits, as many
    utterances of each and `utterances` in all, in place of the training data.
    """

    def prepare(
        self, base: WhisperForConditionalGeneration, batches: Iterable[Batch]
    ) -> Mapping[str, Tensor]:
        """Return the tensors that the densities depend on, by name.

        Args:
            base: The frozen Whisper in eval mode, to be left as it is.
            batches: The training data once, in order, made as they are asked for and on the base's
                device; of a stream its first rows. In full windows, with the encoder's states if
                the fit keeps them.
        """


@runtime_checkable
class NonCentredPrior(Prior, Protocol):
    """A prior whose weights depend on one another, w = map(z) of independent coordinates z."""

    def coordinates(self, site: Site) -> Any:
        """The map, a bijective `Transform` of tensors of `site.shape`; None where w is z.

        Beside that it has `adjoint` and `variance` as `base_informed.Colouring`. It is the same
        object for the same site on the same device.
        """


class Guide(Protocol):
    """The variational family: an `nn.Module` that is called with the model's arguments.

    Its whole state is its `state_dict`, and its parameters are unconstrained.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent site of the model."""

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean: site name -> tensor of the site's shape, without gradient."""

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation, as `mean`; 0 where the guide is a point."""


class Independent(NamedTuple):
    """Independent coordinates z under q, of the site's shape; the factor is map(z)."""

    map: Any
    mean: Tensor
    stddev: Tensor


@runtime_checkable
class NonCentredGuide(Guide, Protocol):
    """A guide in the coordinates of a `NonCentredPrior`."""

    def independent(self) -> dict[str, Independent]:
        """The coordinates of the sites that have some, without gradient."""


@runtime_checkable
class ShrinkingGuide(Guide, Protocol):
    """A guide that can switch ranks off."""

    def shrinkage(self) -> dict[str, Tensor]:
        """Shrinkage factor of every rank: site name -> (modules, rank).

        Near 0 for a rank that is free, near 1 for one that is switched off.
        """


def prior_scale(prior: object) -> float:
    """Return a prior's attribute `scale`, its width in units of the weights; UserError without it.

    Guides of a learned scale start from it.
    """
    scale: float | None = getattr(prior, "scale", None)
    if scale is None:
        raise UserError(
            "the guide needs a prior with a width, and this one has no attribute scale; give the "
            "guide's own prior, or auto-normal"
        )
    return float(scale)


def maps_of(model: FactorPrior) -> dict[str, Any]:
    """Return the map of independent coordinates to the factor of the sites that have one."""
    prior = model.prior
    if not isinstance(prior, NonCentredPrior):
        return {}
    with model.device:
        found = {site.name: prior.coordinates(site) for site in model.sites}
    return {name: one for name, one in found.items() if one is not None}


def independent_of(guide: object) -> dict[str, Independent]:
    """Return `NonCentredGuide.independent` of a guide; empty for a guide without it."""
    return guide.independent() if isinstance(guide, NonCentredGuide) else {}


def shrinkage_of(guide: object) -> dict[str, Tensor]:
    """Return `ShrinkingGuide.shrinkage` of a guide; empty for a guide without it."""
    return guide.shrinkage() if isinstance(guide, ShrinkingGuide) else {}
