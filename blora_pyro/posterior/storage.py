"""How a posterior is stored: `posterior.safetensors`, and its mean as a stock PEFT adapter.

Both ways take and return the attributes of a `Posterior` as they are named there.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.families import PREVIOUS_POSTERIOR
from blora_pyro.models import Pooling
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from blora_pyro.posterior.family import Family

POSTERIOR_FILE = "posterior.safetensors"
DOMAIN_FOLDERS = "domains"  # holds a PEFT adapter for each domain


def write_posterior(attributes: Mapping[str, Any], path: Path) -> None:
    """Write `SITE.mean`, `SITE.stddev` of every site, `guide.NAME` and `prior.NAME`.

    All other attributes go into the metadata, as JSON.
    """
    tensors = {f"{name}.mean": value for name, value in attributes["mean"].items()}
    tensors |= {f"{name}.stddev": value for name, value in attributes["stddev"].items()}
    tensors |= {f"guide.{name}": value for name, value in attributes["state"].items()}
    tensors |= {f"prior.{name}": value for name, value in attributes["prior_tensors"].items()}
    family = attributes["family"]
    about = {
        **{name: attributes[name] for name in ("base", "revision", "alpha")},
        "groups": [asdict(group) for group in attributes["groups"]],
        "prior": family.prior,
        "prior_args": dict(family.prior_args),
        "guide": family.guide,
    }
    if attributes["pooling"] is not None:
        about["pooling"] = asdict(attributes["pooling"])
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"blora_pyro": json.dumps(about)})


def read_posterior(path: Path, prior: str | None = None) -> dict[str, Any]:
    """Read the attributes of a `Posterior`; `prior` as in `Posterior.load`.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["blora_pyro"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        groups = tuple(_group(group) for group in about["groups"])
        if not groups:
            raise ValueError("no layers")
        carried = _named(tensors, "prior.")
        is_carried_on = bool(carried) and about["prior"] == PREVIOUS_POSTERIOR
        sites = {site.name: site.shape for group in groups for site in group.sites}
        for source in (tensors, carried) if is_carried_on else (tensors,):
            for name, shape in sites.items():
                for value in (source[f"{name}.mean"], source[f"{name}.stddev"]):
                    if tuple(value.shape) != shape:
                        raise ValueError(f"{name} has shape {tuple(value.shape)}")
        family = Family(about["prior"], about["prior_args"], about["guide"], runs_code=False)
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
    """Tensors whose names begin with `prefix`, by the rest of their names."""
    named = tensors.items()
    return {name.removeprefix(prefix): one for name, one in named if name.startswith(prefix)}


def _group(stored: dict[str, Any]) -> Group:
    lists = {name: tuple(stored[name]) for name in ("modules", "weight_stddevs")}
    return Group(**{**stored, **lists})


def _pooling(stored: dict[str, Any] | None, groups: tuple[Group, ...]) -> Pooling | None:
    if stored is None:
        return None
    pooling = Pooling(**{**stored, "domains": tuple(stored["domains"])})
    if pooling.stack(pooling.unstack(groups)) != groups:
        raise ValueError("its layers are not those of its domains")
    return pooling


def write_adapter(
    folder: Path,
    groups: tuple[Group, ...],
    alpha: float,
    layers: Iterable[tuple[str, Tensor, Tensor]],
    base: str,
    revision: str | None,
) -> None:
    """Write a stock PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Updates are scaled by alpha / largest rank; `layers` are those of `Posterior.layer_means`.
    """
    from peft import LoraConfig

    ranks = {name: group.rank for group in groups for name in group.modules}
    largest = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    LoraConfig(  # task_type stays None: PEFT's SEQ_2_SEQ_LM wrapper does not take Whisper's inputs
        base_model_name_or_path=base,
        revision=revision,
        r=largest,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={name: alpha / largest * rank for name, rank in other.items()},
        inference_mode=True,
    ).save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG  # PEFT keeps the targets in a set: fix their order
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {}
    for name, a, b in layers:
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
