"""Prior families: a module each, with the prior and the guide that fits it.

A family is a module with `Prior(**arguments)` and `Guide(model)`, see `contracts`. It may also have
an `EXPLANATION`: a text on how it shrinks, which `diagnose` shows with the run's figures filled in
(see `diagnostics.explanations.how_it_shrinks`).

The built-in ones are listed in `blora_pyro.families`; a user's own file loads by its path.
"""

from blora_pyro.families import FAMILIES, GUIDES
from blora_pyro.guides.checks import Check, FamilyReport, check_family
from blora_pyro.guides.contracts import Guide, Prior
from blora_pyro.guides.registry import (
    Argument,
    build_guide,
    build_prior,
    describe_prior,
    latent_sites,
    load_family,
    prepare_prior,
    prior_arguments,
    with_prior_arguments,
)

__all__ = [
    "FAMILIES",
    "GUIDES",
    "Argument",
    "Check",
    "FamilyReport",
    "Guide",
    "Prior",
    "build_guide",
    "build_prior",
    "check_family",
    "describe_prior",
    "latent_sites",
    "load_family",
    "prepare_prior",
    "prior_arguments",
    "with_prior_arguments",
]
