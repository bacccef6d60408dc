"""Any LoRA adapter that PEFT wrote: as a posterior that is a point, or with a weaker update."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from blora_pyro.errors import UserError
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json_of
from blora_pyro.models.peft_adapters import (
    lora_config,
    stored_language_map,
    stored_unsuppressed,
)
from blora_pyro.posterior.combining import LayerFactors, posterior_of
from blora_pyro.posterior.posterior import Posterior
from blora_pyro.posterior.strength import Directions

_KEY = "base_model.model.{}.lora_{}.weight"


def read_lora(
    name: str, folder: Path, net: nn.Module, base: str, revision: str | None = None
) -> Posterior:
    """Return a stored adapter as a posterior of deviation 0, without a prior.

    Args:
        name: The user's name for it.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        net: The base that it adapts.
        base: Name of the base.
        revision: Of the base.

    Raises:
        UserError: If it is no LoRA, is damaged, or changes more than the product of A and B of
            linear layers, which alone a strength can scale.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():  # and what is pickled is never read
        raise UserError(f"'{name}' is an adapter without {ADAPTER_WEIGHTS}; give another")
    config = lora_config(name, folder, net)
    for key in ("use_dora", "lora_bias", "modules_to_save"):
        if getattr(config, key):
            raise _refusal(name, f"has {key}")
    if config.bias != "none":
        raise _refusal(name, f"has bias {config.bias}")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    layers, alphas = {}, [*config.alpha_pattern.values()]
    for layer, alpha in zip(_targets(config), alphas, strict=True):
        if not isinstance(net.get_submodule(layer), nn.Linear):
            raise _refusal(name, f"adapts {layer}, which is no linear layer")
        pair = [tensors.pop(_KEY.format(layer, factor), None) for factor in "AB"]
        layers[layer] = _factors(name, layer, pair, net, alpha, config.use_rslora)
    if tensors:
        raise _refusal(name, f"has {len(tensors)} tensors more, such as {min(tensors)!r:.80}")
    return posterior_of(
        Posterior(
            *(base, (), 1.0, {}, {}),
            revision=revision,
            unsuppressed=tuple(stored_unsuppressed(folder / ADAPTER_WEIGHTS)),
            language_map=stored_language_map(folder / ADAPTER_WEIGHTS),
        ),
        layers,
    )


def _targets(config: Any) -> list[str]:
    """Return the layers in the order of the patterns, whose keys are these names, escaped."""
    return [pattern.replace("\\", "") for pattern in config.alpha_pattern]


def _factors(
    name: str, layer: str, pair: list[Any], net: nn.Module, alpha: float, use_rslora: bool
) -> LayerFactors:
    """Return A and B of a layer at scaling 1: what scales them is in B."""
    weight = net.get_parameter(f"{layer}.weight")
    if any(one is None for one in pair):
        raise _refusal(name, f"has no A or B for {layer}")
    a, b = (one.double() for one in pair)
    if b.shape[:1] + a.shape[1:] != weight.shape or b.shape[1:] != a.shape[:1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise _refusal(name, f"has A and B of {shapes} for {layer} of {tuple(weight.shape)}")
    scaling = alpha / (math.sqrt(len(a)) if use_rslora else len(a))
    stddev = weight.detach().float().std(correction=0).item()
    zeros = torch.zeros_like(a), torch.zeros_like(b)
    return LayerFactors(a, scaling * b, *zeros, 1.0, stddev)


def write_weaker(
    name: str,
    folder: Path,
    output: Path,
    strength: float,
    directions: Mapping[str, Directions] | None = None,
) -> None:
    """Write a stored adapter of another strength: through its alphas, or by `base` through its A.

    Args:
        name: The user's name for it.
        folder: As in `read_lora`, which has passed it.
        output: An empty folder.
        strength: 1 is the adapter as it is, 0 the base.
        directions: For the strength by `base`, see `at_strength`.
    """
    if directions is not None and 0 < strength < 1:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        for layer, one in directions.items():
            key = _KEY.format(layer, "A")
            tensors[key] = one.weaken(tensors[key], strength)
        save_file(tensors, output / ADAPTER_WEIGHTS, metadata=metadata)
        shutil.copyfile(folder / ADAPTER_CONFIG, output / ADAPTER_CONFIG)
        return
    config = read_json_of(name, folder, ADAPTER_CONFIG)
    config["lora_alpha"] = strength * config.get("lora_alpha", 8)
    if patterns := config.get("alpha_pattern"):
        config["alpha_pattern"] = {layer: strength * one for layer, one in patterns.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (output / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    shutil.copyfile(folder / ADAPTER_WEIGHTS, output / ADAPTER_WEIGHTS)


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"'{name}' is an adapter that {why}, which no strength can scale; give a plain LoRA of "
        "linear layers"
    )
