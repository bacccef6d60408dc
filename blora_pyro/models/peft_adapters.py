"""A stored LoRA adapter as PEFT is to see it: the keys of LoRA alone, layers by their own names.

PEFT imports what some keys of an `adapter_config.json` name (`megatron_core`, `auto_mapping`), and
runs others as regular expressions. Here an adapter's file is read by us: what LoRA needs is taken,
with values that it can have, what changes nothing is left out, and anything else is refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from blora_pyro.adapters import ALL_LINEAR, is_finite, whole_match
from blora_pyro.errors import UserError, printable, reason
from blora_pyro.files import parse_json
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json_of

# In the metadata of the weights; PEFT's own file has no place for it.
LANGUAGE_MAP, UNSUPPRESSED = "language_map", "unsuppressed"
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
READ = (
    *(*SWITCHES, "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "bias"),
    *("layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save"),
    "init_lora_weights",
)
# About how it was trained or is stored, or the options of what is off: they change no update.
LEFT_OUT = (
    *("auto_mapping", "megatron_core", "peft_version", "task_type", "inference_mode"),
    *("base_model_name_or_path", "revision", "lora_dropout", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "layers_pattern"),
    "ensure_weight_tying",
)
# Starts that leave the base's own weights as they are.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_PLAIN = re.compile(r"[\w.]+")  # a name of a layer, whose dots match dots
_MOST_PATTERNS, _LARGEST = 20, 1e9


def lora_config(name: str, folder: Path, net: nn.Module) -> Any:
    """Return the `peft.LoraConfig` of a stored adapter, for a net.

    Layers, and their ranks and alphas, are given by whole names, ranks as the weights have them.

    Raises:
        UserError: If it is no LoRA, a value can't be, or a tensor has values that are not finite.
    """
    from peft import LoraConfig

    stored = read_json_of(name, folder, ADAPTER_CONFIG)
    _check_keys(name, stored)
    ranks = _ranks(name, folder)
    targets = _targets(name, stored, net, ranks)
    if not targets:
        raise _refusal(name, "adapts no layer of its base")
    _check_biases(name, folder, stored.get("bias", "none"), net, targets)
    own_alpha = _values(name, stored, "alpha_pattern", "lora_alpha")
    own_rank = _values(name, stored, "rank_pattern", "r")
    alphas = {layer: own_alpha(layer) for layer in targets}
    for layer in targets:
        if (asked := own_rank(layer)) != ranks.get(layer, asked):
            raise _refusal(name, f"asks for rank {asked!r:.40} of {layer}, and has {ranks[layer]}")
    return LoraConfig(
        r=max(ranks.values(), default=1),
        target_modules=targets,
        rank_pattern={re.escape(layer): ranks.get(layer, 1) for layer in targets},
        alpha_pattern={re.escape(layer): alpha for layer, alpha in alphas.items()},
        modules_to_save=stored.get("modules_to_save"),
        bias=stored.get("bias", "none"),
        inference_mode=True,
        **{key: stored.get(key, False) for key in SWITCHES},
    )


def metadata_of(language_map: Mapping[str, str], unsuppressed: Sequence[int]) -> dict[str, str]:
    """Return what a run's adapter says of its base, as metadata of the adapter's weights."""
    about = {LANGUAGE_MAP: dict(language_map), UNSUPPRESSED: list(unsuppressed)}
    return {name: json.dumps(one) for name, one in about.items() if one}


def stored_language_map(weights: Path) -> dict[str, str]:
    """Return what prompts languages without a token, of an adapter's weights; {} if that is unsaid.

    Raises:
        UserError: If it is none.
    """
    found = _stored(weights, LANGUAGE_MAP, {})
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise _unread(weights, LANGUAGE_MAP, f"it has {found!r:.60}")
    return found


def stored_unsuppressed(weights: Path) -> list[int]:
    """Return the tokens that an adapter lets its base say, see `Posterior`; [] if that is unsaid.

    Raises:
        UserError: If they are none.
    """
    found = _stored(weights, UNSUPPRESSED, [])
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise _unread(weights, UNSUPPRESSED, f"it has {found!r:.60}")
    return found


def _stored(weights: Path, name: str, default: Any) -> Any:
    try:
        with safe_open(weights, framework="pt") as file:
            return parse_json((file.metadata() or {}).get(name, json.dumps(default)))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unread(weights, name, reason(error)) from None


def _unread(weights: Path, name: str, why: str) -> UserError:
    return UserError(f"{weights} has no {name} that can be read ({why}); give another")


def _check_keys(name: str, stored: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA, and keys that may change the update in a way that is not known."""
    if (kind := stored.get("peft_type")) != "LORA":
        raise _refusal(name, f"is of type {kind!r:.40}; only LoRA can be merged")
    for key, value in stored.items():
        if key not in (*READ, *LEFT_OUT) and value:
            raise _refusal(
                name, f"has {printable(key, 40)} {value!r:.40}, which is no part of plain LoRA"
            )
    if (start := stored.get("init_lora_weights")) not in STARTS:
        raise _refusal(name, f"has init_lora_weights {start!r:.40}, which changes the base, too")
    for key in SWITCHES:
        if type(value := stored.get(key, False)) is not bool:
            raise _refusal(name, f"has {key} {value!r:.40}; give true or false")
    if (bias := stored.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise _refusal(name, f"has bias {bias!r:.40}")
    saved = stored.get("modules_to_save")
    if saved is not None and not _are_texts(saved):
        raise _refusal(name, f"has modules_to_save {saved!r:.40}")


def _ranks(name: str, folder: Path) -> dict[str, int]:
    """Return the rank of every layer that has factors, once all tensors are known to be finite."""
    ranks = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            for key in weights.keys():
                value = weights.get_tensor(key)
                if not value.is_floating_point() or not is_finite(value):
                    raise _refusal(name, f"has values that are not finite in {printable(key)}")
                if (match := _FACTOR.fullmatch(key)) and value.dim() > 1:
                    ranks[match[1]] = value.shape["AB".index(match[2])]
    except (SafetensorError, OSError) as error:
        raise _refusal(name, f"can't be merged ({reason(error)})") from None
    return ranks


def _check_biases(name: str, folder: Path, kind: str, net: nn.Module, targets: list[str]) -> None:
    """Refuse an adapter without biases that it says were trained: PEFT would take the base's."""
    biases = {layer for layer, _ in net.named_parameters() if layer.endswith("bias")}
    if kind == "lora_only":
        biases &= {f"{layer}.bias" for layer in targets}
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        stored = sum("bias" in key and "lora_" not in key for key in weights.keys())
    if kind != "none" and stored < len(biases):
        raise _refusal(name, f"has {stored} of the {len(biases)} biases that bias {kind} trains")


def _targets(
    name: str, stored: Mapping[str, Any], net: nn.Module, ranks: Iterable[str]
) -> list[str]:
    """Return the layers that an adapter names, as PEFT matches them."""
    layers = [layer for layer, module in net.named_modules() if isinstance(module, _ADAPTED)]
    wanted = _matched(name, stored.get("target_modules"), layers, net)
    excluded = stored.get("exclude_modules")
    if excluded:
        out = {*_matched(name, excluded, layers, net)}
        wanted = [layer for layer in wanted if layer not in out]
    if stored.get("layers_to_transform") is not None:  # some layers only: those with weights
        with_factors = {*ranks}
        wanted = [layer for layer in wanted if layer in with_factors]
    return wanted


_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def _matched(name: str, given: Any, layers: list[str], net: nn.Module) -> list[str]:
    if isinstance(given, str):
        if given.lower() == ALL_LINEAR:
            output = net.get_output_embeddings()  # type: ignore[operator]
            modules = {layer: net.get_submodule(layer) for layer in layers}
            linear = [layer for layer in layers if isinstance(modules[layer], nn.Linear)]
            return [layer for layer in linear if modules[layer] is not output]
        return [*filter(whole_match(given), layers)]
    if not _are_texts(given):
        raise _refusal(name, f"has target_modules {given!r:.40}; give names of layers")
    suffixes = {*given}
    parts = {layer: layer.split(".") for layer in layers}
    return [
        layer
        for layer in layers
        if any(".".join(parts[layer][first:]) in suffixes for first in range(len(parts[layer])))
    ]


def _values(
    name: str, stored: Mapping[str, Any], patterns: str, default: str
) -> Callable[[str], float]:
    """Return a layer's own value, by the first pattern that matches it or the end of it."""
    given, otherwise = stored.get(patterns) or {}, stored.get(default, 8)
    if not isinstance(given, dict):
        raise _refusal(name, f"has {patterns} {given!r:.40}")
    for value in (*given.values(), otherwise):
        if type(value) not in (int, float) or not abs(value) < _LARGEST:
            raise _refusal(name, f"has {value!r:.40} as {patterns} or {default}; give a number")
    plain = {pattern: value for pattern, value in given.items() if _PLAIN.fullmatch(pattern)}
    if len(given) - len(plain) > _MOST_PATTERNS:
        raise _refusal(name, f"has {len(given)} regular expressions as {patterns}")
    places = {pattern: place for place, pattern in enumerate(plain)}
    matches = {one: whole_match(rf"(.*\.)?({one})") for one in given.keys() - plain.keys()}

    def value_of(layer: str) -> float:
        if not matches:  # names alone, of which ours are: there may be one for every layer
            ends = (layer[place:] for place in range(len(layer)) if f".{layer}"[place] == ".")
            first = min((places[end] for end in ends if end in plain), default=None)
            return otherwise if first is None else [*plain.values()][first]
        for pattern, value in given.items():
            match = matches.get(pattern)
            if match(layer) if match else f".{layer}".endswith(f".{pattern}"):
                return value
        return otherwise

    return value_of


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"base model '{name}' is an adapter that {why}; give a plain LoRA adapter, or what it was "
        "merged into"
    )
