"""Which options of a fit go together with several domains."""

import re
from typing import TYPE_CHECKING

from blora_pyro.errors import UserError
from blora_pyro.guides import FAMILIES
from blora_pyro.models.pooling import COMPLETE, HIERARCHICAL, POOLINGS

if TYPE_CHECKING:
    from blora_pyro.config.fit_config import FitConfig

# The rows of a site must be independent: the horseshoe has one scale for them all.
FAMILIES_BY_ROW = tuple(name for name in FAMILIES if name != "horseshoe")
_NAME = re.compile(r"[\w-][\w.-]*")


def check_pooling(config: "FitConfig") -> None:
    """Refuse what can't be pooled.

    Raises:
        UserError: Naming the option, and what to do.
    """
    kind = config.pooling or COMPLETE
    if kind not in POOLINGS:
        raise UserError(f"pooling is '{kind}'; give one of {', '.join(POOLINGS)}")
    if config.pooling_scale is not None and kind != HIERARCHICAL:
        raise UserError(
            f"pooling_scale is {config.pooling_scale:g}, and pooling is {kind}; give pooling "
            f"{HIERARCHICAL}, or leave pooling_scale out"
        )
    if kind == COMPLETE:
        return
    if len(config.sources) < 2:
        raise UserError(f"pooling is {kind}, and data is one domain; give two or more, NAME=SOURCE")
    for name in config.domains:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"pooling is {kind}, and a domain is called '{name}'; give its data as "
                "NAME=SOURCE, with a name of letters, digits, '.', '-' and '_'"
            )
    _check_others(config)


def _check_others(config: "FitConfig") -> None:
    """Refuse options that know of one domain alone."""
    is_family, its_guides = config.prior in FAMILIES_BY_ROW, (None, config.prior, "point")
    possible = {
        "prior_from": (config.prior_from is None, "leave it out"),
        "ewc": (not config.ewc, "leave it out"),
        "test": (config.test is None, "each domain's test set is that of its data"),
        "dev": (config.dev is None, "leave it out"),
        "eval_every": (config.eval_every is None, "leave it out"),
        "estimator": (config.estimator == "shared", "give shared"),
        "prior": (is_family, f"give one of {', '.join(FAMILIES_BY_ROW)}"),
        "guide": (config.guide in its_guides, "give the prior's own, or point"),
    }
    for name, (is_possible, instead) in possible.items():
        if not is_possible:
            raise UserError(
                f"{name} is {getattr(config, name)}, which pooling {config.pooling} can't take; "
                f"{instead}, or fit with pooling {COMPLETE}"
            )
