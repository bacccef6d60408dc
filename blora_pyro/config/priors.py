"""Which options of a fit name its prior."""

import math
from typing import TYPE_CHECKING

from blora_pyro.errors import UserError
from blora_pyro.guides import previous_posterior

if TYPE_CHECKING:
    from blora_pyro.config.fit_config import FitConfig


def check_prior(config: "FitConfig") -> None:
    """Refuse two priors at once.

    Raises:
        UserError: Naming the option, and what to do.
    """
    inflation = config.prior_inflation
    if inflation is not None and config.prior_from is None:
        raise UserError(f"prior_inflation is {inflation}, but no prior_from; give both")
    if inflation is not None and not 1 <= inflation < math.inf:
        raise UserError(f"prior_inflation is {inflation}; give a number from 1, to forget more")
    resolved = config.prior == previous_posterior.NAME  # as `with_prior_args` leaves it
    if config.prior_from is None:
        if resolved:
            raise UserError(f"prior is '{config.prior}', but no prior_from; give that alone")
        return
    others = {
        "prior": config.prior not in ("normal", previous_posterior.NAME),
        "prior_scale": config.prior_scale is not None,
        "prior_args": bool(config.prior_args) and not resolved,
        "guide": config.guide not in (None, "normal"),
    }
    for name in (name for name, given in others.items() if given):
        raise UserError(
            f"{name} and prior_from are given, and the earlier run's posterior is prior and "
            f"start of the guide; leave {name} out"
        )
