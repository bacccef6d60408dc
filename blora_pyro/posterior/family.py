"""The prior and the guide that a posterior comes from, and how to build them again."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pyro
import torch
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.families import (
    NO_PRIOR,
    PREVIOUS_POSTERIOR,
    check_code,
    check_hashes,
    code_hashes,
    is_code,
)
from blora_pyro.guides import Guide, build_guide, build_prior, previous_posterior
from blora_pyro.guides.contracts import PreparedPrior, Prior
from blora_pyro.models import FactorPrior


@dataclass(frozen=True)
class Family:
    """Names and arguments of a prior and a guide.

    Attributes:
        prior: Name of the prior family, or the path of a user's file.
        prior_args: Arguments of the prior.
        guide: Name of the guide, or the path of a user's file.
        runs_code: Whether the user has named these files in this session, so that they may be run.
        code_sha256: SHA-256 of the user's files, by `prior` and `guide`; None if it is not known.
    """

    prior: str = "normal"
    prior_args: Mapping[str, Any] = field(default_factory=dict)
    guide: str = "normal"
    runs_code: bool = True
    code_sha256: Mapping[str, str] | None = None

    @classmethod
    def of(cls, prior: str, prior_args: Mapping[str, Any], guide: str) -> Self:
        """The family of a fit, with the hashes of the user's files as they are now."""
        hashes = code_hashes({"prior": prior, "guide": guide})
        return cls(prior, prior_args, guide, code_sha256=hashes or None)

    @property
    def files(self) -> tuple[str, ...]:
        """The user's files among prior and guide."""
        return tuple(dict.fromkeys(n for n in (self.prior, self.guide) if is_code(n)))

    @property
    def is_usable(self) -> bool:
        """Whether there is no file of the user's that may not be run."""
        return self.runs_code or not self.files

    def with_file(self, path: str) -> Self:
        """The same family with `path`, which the user has just named, as the user's file.

        Raises:
            UserError: If the run was not fitted with exactly one file, or this is another.
        """
        if len(self.files) != 1:
            raise UserError(f"the run's prior is {self.prior}, not one file; leave --prior out")
        prior, guide = (path if n in self.files else n for n in (self.prior, self.guide))
        return replace(self, prior=prior, guide=guide).trusted()

    def trusted(self) -> Self:
        """The same family, whose files may be run: the user trusts them.

        Raises:
            UserError: If they are not those that the run was fitted with.
        """
        check_hashes({"prior": self.prior, "guide": self.guide}, self.code_sha256, "the run")
        return replace(self, runs_code=True)

    def _check_named(self) -> None:
        if not self.runs_code:
            given, way = (
                {"prior": self.prior, "guide": self.guide},
                "name it with --prior to run it",
            )
            check_code(given, (), "the run", way)

    def build_prior(self, groups: tuple[Group, ...], tensors: Mapping[str, Tensor]) -> FactorPrior:
        """The prior as a Pyro program over the factors of `groups`, on the CPU.

        `tensors` are those that the prior stores with the posterior.

        Raises:
            UserError: If the prior is a file that the user has not named, or is gone.
        """
        self._check_named()
        if self.prior == NO_PRIOR:
            raise UserError(
                "the adapter is made of several runs, or part of one, and has no prior; give a run"
            )
        density: Prior | None = None
        if self.prior != PREVIOUS_POSTERIOR:
            density = build_prior(self.prior, **self.prior_args)
        elif tensors:
            density = previous_posterior.Prior(groups, tensors, **self.prior_args)
        if density is None or (isinstance(density, PreparedPrior) and not tensors):
            raise UserError(
                f"the adapter was turned away from its prior, {self.prior} (by pruning, or a "
                "strength by signal-to-noise or base); give the run itself"
            )
        if isinstance(density, PreparedPrior):
            density.tensors = tensors
        return FactorPrior(groups, density, torch.device("cpu"))

    def build_guide(self, prior: FactorPrior, state: Mapping[str, Tensor]) -> Guide:
        """The fitted guide for `prior`, of a `state_dict`.

        Raises:
            UserError: If the guide is a file that the user has not named, or the state does not fit
                it.
        """
        self._check_named()
        with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            guide = build_guide(self.guide, prior)
            guide()  # Pyro's own guides create their parameters in the first call
        assert isinstance(guide, torch.nn.Module)
        try:
            guide.load_state_dict(dict(state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"guide {self.guide} is not the fitted one: {reason}") from None
        return guide


def normal_guide(
    groups: tuple[Group, ...], mean: Mapping[str, Tensor], stddev: Mapping[str, Tensor]
) -> Guide:
    """A guide of independent Normals with these moments, by site name."""
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        program = FactorPrior(groups, build_prior("normal"), torch.device("cpu"))
        guide: Any = build_guide("normal", program)
        previous_posterior.start_at(guide, mean, stddev)
    return guide
