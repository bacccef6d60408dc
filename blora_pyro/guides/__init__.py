"""Prior families: a module each, with the prior and the guide that fits it.

A family is a module with these two names:

- `Prior(**arguments)`: called with a `Site`, returns a Pyro distribution of batch shape (modules,)
  and event shape (rows, columns). A hierarchical prior samples sites of its own before.
- `Guide(model)`: an `nn.Module` with the model's arguments, that samples every site of `model` and
  answers `mean()` and `stddev()` with a dict of site name -> tensor of the site's shape.

A family may also have an `EXPLANATION`: a text on how it shrinks, which `diagnose` shows with the
run's figures filled in (see `diagnostics.explanations.how_it_shrinks`).

The built-in ones are listed in `FAMILIES`; a user's own file with the same two names loads by its
path.
"""

from blora_pyro.guides.registry import (
    FAMILIES,
    GUIDES,
    Argument,
    Guide,
    build_guide,
    build_prior,
    describe_prior,
    latent_sites,
    load_family,
    prior_arguments,
    with_prior_arguments,
)

__all__ = [
    "FAMILIES",
    "GUIDES",
    "Argument",
    "Guide",
    "build_guide",
    "build_prior",
    "describe_prior",
    "latent_sites",
    "load_family",
    "prior_arguments",
    "with_prior_arguments",
]
