"""`posterior.safetensors`: the moments of q, the guide's state, and how to build them again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.models import Pooling
from blora_pyro.posterior.families import Family

if TYPE_CHECKING:
    from blora_pyro.posterior.posterior import Posterior

FILE = "posterior.safetensors"
DOMAINS = "domains"  # folder beside it: a PEFT adapter for each domain


def write_posterior(posterior: "Posterior", path: Path) -> None:
    """Write the file: for every site `SITE.mean` and `SITE.stddev`, and `guide.NAME`, `prior.NAME`.

    All else is in the metadata, as JSON.
    """
    tensors = {f"{name}.mean": value for name, value in posterior.mean.items()}
    tensors |= {f"{name}.stddev": value for name, value in posterior.stddev.items()}
    tensors |= {f"guide.{name}": value for name, value in posterior.state.items()}
    tensors |= {f"prior.{name}": value for name, value in posterior.prior_tensors.items()}
    about = {
        "base": posterior.base,
        "revision": posterior.revision,
        "alpha": posterior.alpha,
        "groups": [asdict(group) for group in posterior.groups],
        "prior": posterior.family.prior,
        "prior_args": dict(posterior.family.prior_args),
        "guide": posterior.family.guide,
    }
    if posterior.pooling is not None:
        about["pooling"] = asdict(posterior.pooling)
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"blora_pyro": json.dumps(about)})


def read_posterior(path: Path, prior: str | None = None) -> dict[str, Any]:
    """The attributes of a `Posterior`.

    Args:
        path: The file.
        prior: See `Posterior.load`.

    Raises:
        UserError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["blora_pyro"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        groups = tuple(_group(group) for group in about["groups"])
        if not groups:
            raise ValueError("no layers")
        carried = _named(tensors, "prior.")
        for site in (site for group in groups for site in group.sites):
            for name in (f"{site.name}.mean", f"{site.name}.stddev"):
                for value in [tensors[name], *([carried[name]] if carried else [])]:
                    if tuple(value.shape) != site.shape:
                        raise ValueError(f"{site.name} has shape {tuple(value.shape)}")
        family = Family(about["prior"], about["prior_args"], about["guide"], runs_code=False)
        sites = [site.name for group in groups for site in group.sites]
        return {
            "base": about["base"],
            "groups": groups,
            "alpha": about["alpha"],
            "mean": {name: tensors[f"{name}.mean"] for name in sites},
            "stddev": {name: tensors[f"{name}.stddev"] for name in sites},
            "family": family if prior is None else family.with_file(prior),
            "state": _named(tensors, "guide."),
            "revision": about.get("revision"),
            "prior_tensors": carried,
            "pooling": _pooling(about.get("pooling"), groups),
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}); fit again, or give another run"
        ) from None


def _named(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Those whose names begin so, without it."""
    chosen = (name for name in tensors if name.startswith(prefix))
    return {name.removeprefix(prefix): tensors[name] for name in chosen}


def _group(stored: dict[str, Any]) -> Group:
    """A group as JSON has it, its lists tuples again."""
    lists = {name: tuple(stored[name]) for name in ("modules", "weight_stddevs")}
    return Group(**{**stored, **lists})


def _pooling(stored: dict[str, Any] | None, groups: tuple[Group, ...]) -> Pooling | None:
    """A pooling as JSON has it."""
    if stored is None:
        return None
    pooling = Pooling(**{**stored, "domains": tuple(stored["domains"])})
    if pooling.stack(pooling.unstack(groups)) != groups:
        raise ValueError("its layers are not those of its domains")
    return pooling
