"""Names of the built-in prior families and guides, and what is a file of code instead."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError

BASE_INFORMED = "base-informed"
AUTO_LOWRANK = "auto-lowrank"
FAMILIES = {
    "normal": "blora_pyro.guides.normal",
    "laplace": "blora_pyro.guides.laplace",
    "student-t": "blora_pyro.guides.student_t",
    "scale-mixture": "blora_pyro.guides.scale_mixture",
    "horseshoe": "blora_pyro.guides.horseshoe",
    "learned-scale": "blora_pyro.guides.learned_scale",
    "pretrained-scale": "blora_pyro.guides.pretrained_scale",
    "a-only": "blora_pyro.guides.a_only",
    BASE_INFORMED: "blora_pyro.guides.base_informed",
}
GUIDES = {
    **FAMILIES,
    "point": "blora_pyro.guides.point",
    "auto-normal": "blora_pyro.guides.auto_normal",
    AUTO_LOWRANK: "blora_pyro.guides.auto_lowrank",
}
PREVIOUS_POSTERIOR = "previous-posterior"  # the prior that `prior_from` resolves to
NO_PRIOR = "none"  # of a posterior combined of several, or of one domain's part of one
# Families whose weights depend on one another, by a scale that rows share or along directions of
# a layer's inputs: they cannot be pooled.
DEPENDENT_ROWS = ("horseshoe", BASE_INFORMED)
# Guides whose deviations are not all those of independent Normals, softplus(rho).
NOT_MEAN_FIELD = ("point", "auto-normal", AUTO_LOWRANK, "horseshoe")

ROLES = ("prior", "guide")  # options that may name a file of code


def is_code(name: object) -> bool:
    """Return whether a prior or guide is a user's file, which loading it would run.

    Whatever is not the name of a built-in one is such a file, however it is spelt.
    """
    built_in = (*GUIDES, PREVIOUS_POSTERIOR, NO_PRIOR)
    return name is not None and name not in built_in


def code_path(name: object) -> Path | None:
    """Return the resolved path of the `.py` file that a prior or guide names; None if it is none.

    A link counts as what it leads to. Nothing is run.
    """
    try:
        path = Path(str(name)).resolve()
        return path if is_code(name) and path.suffix == ".py" and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # NUL in a name, links in a circle
        return None


def code_hashes(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of the files of code among prior and guide, by `prior` and `guide`."""
    paths = {role: code_path(given.get(role)) for role in ROLES}
    return {
        role: hashlib.sha256(path.read_bytes()).hexdigest()
        for role, path in paths.items()
        if path is not None
    }


def check_code(given: Mapping[str, Any], named: Iterable[object], where: str, way: str) -> None:
    """Refuse files of code that something stored names, and the user does not.

    Args:
        given: With `prior` and `guide`, or without.
        named: What the user names in this call.
        where: The names are stored, for the message.
        way: How the user names one, with `{role}` and `{name}`.

    Raises:
        UserError: Naming the first that the user does not name.
    """
    named = [str(one) for one in named]
    allowed = {path for path in map(code_path, named) if path is not None}
    for role in ROLES:
        name = given.get(role)
        if is_code(name) and str(name) not in named and code_path(name) not in allowed:
            how = way.format(role=role, name=name)
            raise UserError(f"{where} names code as {role}, {name}; {how}")


def check_hashes(given: Mapping[str, Any], known: object, where: str) -> None:
    """Refuse files of code that are not those that a run was fitted with.

    Args:
        given: With `prior` and `guide`, or without.
        known: The run's `code_hashes`; None, of a run of an earlier version, passes.
        where: The run, for the message.

    Raises:
        UserError: Naming the first that has changed.
    """
    if known is None:
        return
    if not isinstance(known, Mapping):
        raise UserError(f"{where} is damaged (code_sha256 is {known!r:.60}); fit again")
    for role, found in code_hashes(given).items():
        if known.get(role) != found:
            raise UserError(
                f"{given[role]} is not the file that {where} was fitted with (its SHA-256 differs);"
                " give that one, or fit again"
            )
