"""Continued runs: an earlier run's posterior is the prior of the next fit, and its start.

Bayes' rule in two steps: with p(w | D1) as the prior of D2 comes p(w | D1, D2), without D1 at hand.
Where posteriors are approximated it is variational continual learning (Nguyen et al.,
arXiv 1710.10628). A and B must mean the same in both fits, so base, layers, ranks and alpha are the
same.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from blora_pyro.adapters import SAME_WEIGHTS, Group
from blora_pyro.errors import UserError
from blora_pyro.guides import previous_posterior
from blora_pyro.models.folders import is_same_place
from blora_pyro.options import ADAPTER_SHAPE, TARGETS, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.record import Link


@dataclass(frozen=True)
class Previous:
    """A run that is continued.

    Attributes:
        folder: Folder of the run, as given.
        posterior: Its posterior.
        config: Options of its fit, resolved.
        chain: The runs before it, from its `run.json`; see `link`.
    """

    folder: str
    posterior: Posterior
    config: FitConfig
    chain: tuple[Link, ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> "Previous":
        """Read a run that can be continued.

        Raises:
            UserError: If it can't be read, is unfinished, pruned or combined, or has no spread.
        """
        posterior, record = read_run(folder)
        posterior = at_strength(posterior, 1.0)  # a contract's strength is no belief
        if record.made_of:
            how, whole = record.made_of
            raise UserError(f"prior_from is {folder}, a {how} run; give {whole}")
        points = sorted({n[0] for n, sd in posterior.stddev.items() if not bool((sd > 0).all())})
        if points:
            raise UserError(
                f"prior_from is {folder}, whose {' and '.join(points)} are points without a spread "
                f"(prior {posterior.family.prior}, guide {posterior.family.guide}); give a run "
                "with another guide"
            )
        if posterior.independent:
            raise UserError(
                f"prior_from is {folder}, whose weights depend on one another (prior "
                f"{posterior.family.prior}), and a chain takes them one by one; give a run with "
                "another prior"
            )
        chain = tuple(record.chain or ())
        return cls(str(folder), posterior, record.resolved, chain)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Mapping of `{site}.mean` and `{site}.stddev` to tensors of the site's shape."""
        mean = {f"{name}.mean": value.cpu() for name, value in self.posterior.mean.items()}
        return mean | {
            f"{name}.stddev": value.cpu() for name, value in self.posterior.stddev.items()
        }

    def link(self, inflation: float | None) -> list[Link]:
        """Return the `chain` in `run.json` of the next fit: all runs before it, oldest first."""
        fingerprint = self.posterior.fingerprint
        own: Link = {"run": self.folder, "fingerprint": fingerprint, "inflation": inflation or 1.0}
        return [*self.chain, own]

    def complete(self, config: FitConfig) -> FitConfig:
        """Return the configuration of the next fit, with the run's own values where none is given.

        Raises:
            UserError: If base, revision or what shapes the adapter are given, and are not the
                run's.
        """
        own = self.posterior
        if "base" in config.given and not is_same_place(config.base, own.base):
            raise UserError(
                f"base is '{config.base}', and {self.folder} was fitted on '{own.base}'; leave "
                "base out"
            )
        known_of = {"revision": own.revision}
        known_of |= {name: getattr(self.config, name) for name in ADAPTER_SHAPE}
        for name, known in known_of.items():
            value = getattr(config, name)
            if name in config.given and value is not None and value != known:
                raise UserError(
                    f"{name} is {value}, and that of {self.folder} is {known}; leave {name} out"
                )
        targets = {  # other words for the same layers are fine, see `check`
            name: getattr(config if name in config.given else self.config, name) for name in TARGETS
        }
        base = config.base if "base" in config.given else own.base
        return config.with_options(base=base, **known_of, **targets)

    def check(self, groups: tuple[Group, ...], target_modules: str) -> None:
        """Refuse a base or layers that are not the run's.

        Raises:
            UserError: Naming what differs.
        """
        own = self.posterior.groups
        shapes = [[(one.key, one.modules, one.rank) for one in some] for some in (groups, own)]
        if shapes[0] != shapes[1]:
            counts = [sum(len(one.modules) for one in some) for some in (groups, own)]
            raise UserError(
                f"target_modules is '{target_modules}', {counts[0]} layers, and those of "
                f"{self.folder} are '{self.config.target_modules}', {counts[1]}; leave "
                "target_modules out"
            )
        for new, old in zip(groups, own, strict=True):
            stddevs = old.weight_stddevs or new.weight_stddevs
            for name, *pair in zip(new.modules, new.weight_stddevs, stddevs, strict=True):
                if not math.isclose(*pair, rel_tol=SAME_WEIGHTS):
                    raise UserError(
                        f"the weights of base '{self.posterior.base}' are not those that "
                        f"{self.folder} was fitted on ({name} differs); bring them back, or fit "
                        "that run again"
                    )

    def prior(self, inflation: float | None) -> previous_posterior.Prior:
        """Return the next fit's prior."""
        return previous_posterior.Prior(self.posterior.groups, self.tensors, inflation or 1.0)

    def start(self, guide: Any) -> None:
        """Set the next fit's guide, a mean-field Normal, to the posterior."""
        previous_posterior.start_at(guide, self.posterior.mean, self.posterior.stddev)


def continued(config: FitConfig) -> tuple[FitConfig, Previous | None]:
    """Return a configuration completed by the run that `prior_from` names, and that run, if any.

    Raises:
        UserError: If that run can't be continued, a prior is given, too, or see
            `Previous.complete`.
    """
    if config.prior_from is None:
        return config, None
    if "prior" in config.given:
        raise UserError(
            f"prior is '{config.prior}' and prior_from is {config.prior_from}; give one"
        )
    previous = Previous.read(config.prior_from)
    return previous.complete(config), previous


def previous_of(config: FitConfig, chain: list[Link] | None = None) -> Previous | None:
    """Return the run that a fit continues; None without `prior_from`.

    Raises:
        UserError: If that run can't be continued, or has changed since.
    """
    if config.prior_from is None:
        return None
    previous = Previous.read(config.prior_from)
    if chain is not None and chain != previous.link(config.prior_inflation):
        raise UserError(
            f"{config.prior_from}, whose posterior is this fit's prior, has changed since it was "
            "started; bring it back, or start again with --overwrite"
        )
    return previous
