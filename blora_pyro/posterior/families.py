"""Which prior and guide a posterior comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blora_pyro.errors import UserError

NO_PRIOR = "none"  # of a posterior that is combined of several, or one domain's


@dataclass(frozen=True)
class Family:
    """Which prior and guide a posterior comes from, and so how to build them again.

    Attributes:
        prior: Name of the prior family, or the path of a user's file.
        prior_args: Its arguments.
        guide: Name of the guide, or the path of a user's file.
        runs_code: Whether the user has named those files here and now, so that they may be run.
    """

    prior: str = "normal"
    prior_args: Mapping[str, Any] = field(default_factory=dict)
    guide: str = "normal"
    runs_code: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """The user's files among prior and guide."""
        return tuple(dict.fromkeys(n for n in (self.prior, self.guide) if n.endswith(".py")))

    def with_file(self, path: str) -> "Family":
        """The same with `path`, which the user has just named, for the user's file.

        Raises:
            UserError: If the run was not fitted with one file.
        """
        if len(self.files) != 1:
            raise UserError(f"the run's prior is {self.prior}, not one file; leave --prior out")
        prior, guide = (path if n in self.files else n for n in (self.prior, self.guide))
        return replace(self, prior=prior, guide=guide, runs_code=True)
