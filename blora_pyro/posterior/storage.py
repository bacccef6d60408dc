"""How a posterior is stored: `posterior.safetensors`, and its mean as a stock PEFT adapter.

Both ways take and return the attributes of a `Posterior` as they are named there.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blora_pyro.adapters import Group, is_finite, scalings_of
from blora_pyro.errors import UserError, reason
from blora_pyro.families import BASE_INFORMED, GUIDES, PREVIOUS_POSTERIOR, is_code
from blora_pyro.files import check_name, parse_json
from blora_pyro.models import Pooling
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from blora_pyro.models.peft_adapters import metadata_of
from blora_pyro.models.second_moments import check_statistics, statistics_sizes
from blora_pyro.options import LARGEST
from blora_pyro.posterior.family import Family

POSTERIOR_FILE = "posterior.safetensors"
DOMAIN_FOLDERS = "domains"  # holds a PEFT adapter for each domain
LARGEST_MOMENT = 1e6  # so that no product of what is stored overflows, as `LARGEST` of an alpha
_LAYER = re.compile(r"[\w.@-]+")


def write_posterior(attributes: Mapping[str, Any], path: Path) -> None:
    """Write `SITE.mean`, `SITE.stddev` of every site, `guide.NAME` and `prior.NAME`.

    Where A has another strength by `base` these are the fit's, and `weaker.SITE.mean` and
    `weaker.SITE.stddev` are A's. All other attributes go into the metadata, as JSON.
    """
    weaker = {}
    if (weakened := attributes["weakened"]) is not None:
        weaker = {
            f"weaker.{site.name}.{what}": attributes[what][site.name]
            for site in (group.A for group in attributes["groups"])
            for what in ("mean", "stddev")
        }
        attributes = {**attributes, **weakened._asdict()}
    tensors = {f"{name}.mean": value for name, value in attributes["mean"].items()}
    tensors |= {f"{name}.stddev": value for name, value in attributes["stddev"].items()}
    tensors |= {f"guide.{name}": value for name, value in attributes["state"].items()}
    tensors |= {f"prior.{name}": value for name, value in attributes["prior_tensors"].items()}
    tensors |= weaker
    family = attributes["family"]
    about = {
        **{name: attributes[name] for name in ("base", "revision", "alpha")},
        "groups": [group.to_json() for group in attributes["groups"]],
        "prior": family.prior,
        "prior_args": dict(family.prior_args),
        "guide": family.guide,
    }
    if family.code_sha256 is not None:
        about["code_sha256"] = dict(family.code_sha256)
    if attributes["pooling"] is not None:
        about["pooling"] = asdict(attributes["pooling"])
    if attributes["language_map"]:
        about["language_map"] = dict(attributes["language_map"])
    if attributes["unsuppressed"]:
        about["unsuppressed"] = list(attributes["unsuppressed"])
    if attributes["fitted_alpha"] is not None:
        about["fitted_alpha"] = attributes["fitted_alpha"]
    if weakened is not None:
        about["strength_by_base"] = weakened.strength
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"blora_pyro": json.dumps(about)})


def read_posterior(path: Path, prior: str | None = None) -> dict[str, Any]:
    """Read the attributes of a `Posterior`; `prior` as in `Posterior.load`.

    Under `weaker` are the arguments of its `with_weaker`, or None, in place of `weakened`.

    Nothing in the file is taken on trust: types, shapes, that every number is finite, that
    deviations are above 0 (or 0 where q is a point), and that names can be parts of a path.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["blora_pyro"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        groups = tuple(_group(group) for group in _list_of(about, "groups", dict))
        sites = {site.name: site.shape for group in groups for site in group.sites}
        if not groups or len(sites) < 2 * len(groups):
            raise ValueError("no layers, or two groups of one shape")
        family, pooling = _family(about), _pooling(about.get("pooling"), groups)
        if not all(_LAYER.fullmatch(name) for group in groups for name in group.modules):
            raise ValueError("'modules' has a name that is no layer's")
        carried, state = _named(tensors, "prior."), _named(tensors, "guide.")
        # A guide with a state is as it was fitted; pruning may leave points among other weights.
        _check_moments(tensors, sites, is_whole=bool(state) and family.guide in GUIDES)
        if carried and family.prior == PREVIOUS_POSTERIOR:
            _check_moments(carried, sites, is_whole=True, are_points=False)
        if carried and family.prior == BASE_INFORMED:
            layers = {name: group for group in groups for name in group.modules}
            lam_b = family.prior_args.get("lam_b", 0)  # which older runs have not
            check_statistics(carried, statistics_sizes(layers, bool(lam_b)))
        weaker = None
        if "strength_by_base" in about:
            moments, shapes = _named(tensors, "weaker."), {g.A.name: g.A.shape for g in groups}
            _check_moments(moments, shapes, is_whole=False)
            if not (strength := _positive(about, "strength_by_base")) < 1:
                raise ValueError(f"'strength_by_base' is {strength}, not below 1")
            kinds = ({n: moments[f"{n}.{what}"] for n in shapes} for what in ("mean", "stddev"))
            weaker = (strength, *kinds)
        for prefix, name, rest in (
            ("guide.", family.guide, state),
            ("prior.", family.prior, carried),
        ):
            for key, value in rest.items():
                if is_code(name):
                    continue
                if not is_finite(value):
                    raise ValueError(f"{prefix}{key} has values that are not finite")
                if prefix == "guide." and value.numel() and value.abs().max() > LARGEST_MOMENT:
                    raise ValueError(f"{prefix}{key} has values beyond {LARGEST_MOMENT:,.0f}")
        return {
            "base": _text(about, "base"),
            "groups": groups,
            "alpha": 0.0 if about["alpha"] == 0 else _positive(about, "alpha"),  # at strength 0
            "mean": {name: tensors[f"{name}.mean"] for name in sites},
            "stddev": {name: tensors[f"{name}.stddev"] for name in sites},
            "family": family if prior is None else family.with_file(prior),
            "state": state,
            "revision": None if about.get("revision") is None else _text(about, "revision"),
            "prior_tensors": carried,
            "pooling": pooling,
            "language_map": _texts({"language_map": {}, **about}, "language_map"),
            "unsuppressed": tuple(_list_of({"unsuppressed": [], **about}, "unsuppressed", int)),
            "fitted_alpha": _positive(about, "fitted_alpha") if "fitted_alpha" in about else None,
            "weaker": weaker,
        }
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({reason(error)}); fit again, or give "
            "another run"
        ) from None


def _check_moments(
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, tuple[int, ...]],
    is_whole: bool,
    are_points: bool = True,
) -> None:
    """Refuse means and deviations that can't be.

    Args:
        tensors: `SITE.mean` and `SITE.stddev` of every site.
        sites: Site name -> shape.
        is_whole: A site must be a density in all its elements, or a point in all of them.
        are_points: A site may be a point, of deviation 0.

    Raises:
        KeyError, ValueError: Naming the first.
    """
    for name, shape in sites.items():
        for key in (f"{name}.mean", f"{name}.stddev"):
            value = tensors[key]
            if tuple(value.shape) != shape or value.dtype not in (torch.float32, torch.float64):
                what = f"{tuple(value.shape)} of {value.dtype}"
                raise ValueError(f"{key} is {what}, and not {shape} of torch.float32")
            if not is_finite(value):
                raise ValueError(f"{key} has values that are not finite")
            if value.abs().max() > LARGEST_MOMENT:
                raise ValueError(f"{key} has values beyond {LARGEST_MOMENT:,.0f}")
        stddev = tensors[f"{name}.stddev"]
        low, high = torch.aminmax(stddev)
        if low < 0 or (low == 0 and (not are_points or (is_whole and high > 0))):
            raise ValueError(f"{name}.stddev has deviations that are not above 0")


def _family(about: Mapping[str, Any]) -> Family:
    arguments, hashes = about["prior_args"], about.get("code_sha256")
    if not isinstance(arguments, dict) or not isinstance(hashes, dict | None):
        raise ValueError("'prior_args' or 'code_sha256' are no JSON objects")
    prior, guide = _text(about, "prior"), _text(about, "guide")
    if prior == PREVIOUS_POSTERIOR:
        if arguments.keys() - {"inflation"}:
            raise ValueError(f"'prior_args' has {', '.join(arguments)}")
        arguments = {name: _positive(arguments, name) for name in arguments}
    return Family(prior, arguments, guide, runs_code=False, code_sha256=hashes)


def _text(stored: Mapping[str, Any], name: str) -> str:
    if not isinstance(value := stored[name], str):
        raise ValueError(f"'{name}' is {value!r:.60}, no text")
    return value


def _texts(stored: Mapping[str, Any], name: str) -> dict[str, str]:
    value = stored[name]
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ValueError(f"'{name}' is {value!r:.60}")
    return value


def _positive(stored: Mapping[str, Any], name: str) -> float:
    value = stored[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        raise ValueError(f"'{name}' is {value!r:.60}, no number above 0 and below {LARGEST:g}")
    return value


def _list_of(stored: Mapping[str, Any], name: str, kind: Any) -> list[Any]:
    value = stored[name]
    if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
        raise ValueError(f"'{name}' is {value!r:.60}")
    return value


def _named(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Tensors whose names begin with `prefix`, by the rest of their names."""
    named = tensors.items()
    return {name.removeprefix(prefix): one for name, one in named if name.startswith(prefix)}


def _group(stored: dict[str, Any]) -> Group:
    modules = tuple(_list_of(stored, "modules", str))
    stddevs = tuple(_list_of(stored, "weight_stddevs", float | int))
    group = Group(**{**stored, "modules": modules, "weight_stddevs": stddevs})
    for name in ("out_features", "in_features", "rank"):
        if type(stored[name]) is not int or stored[name] < 1:
            raise ValueError(f"'{name}' is {stored[name]!r:.60}")
    if not modules or len({*modules}) < len(modules) or len(stddevs) not in (0, len(modules)):
        raise ValueError("'modules' and 'weight_stddevs' do not belong together")
    if not all(0 <= one < math.inf for one in stddevs) or not re.fullmatch(
        r"(_r\d+)*", _text({"suffix": "", **stored}, "suffix")
    ):
        raise ValueError("'weight_stddevs' or 'suffix' can't be")
    _positive({"relative_scaling": 1.0, **stored}, "relative_scaling")
    return group


def _pooling(stored: dict[str, Any] | None, groups: tuple[Group, ...]) -> Pooling | None:
    if stored is None:
        return None
    domains = tuple(_list_of(stored, "domains", str))
    try:
        for name in domains:
            check_name(name, "a domain")
    except UserError as error:
        raise ValueError(str(error)) from None
    if (
        not domains
        or len({*domains}) < len(domains)
        or stored["kind"] not in ("hierarchical", "none")
    ):
        raise ValueError("'domains' or 'kind' can't be")
    pooling = Pooling(**{**stored, "domains": domains, "scale": _positive(stored, "scale")})
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
    language_map: Mapping[str, str],
    unsuppressed: tuple[int, ...],
) -> None:
    """Write a stock PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

    PEFT scales a layer's update by alpha / rank, or where use_rslora is on by alpha / √rank. It is
    on if that is how all layers are scaled. `alpha_pattern` has the alphas that are not that of the
    layers of the largest rank; `layers` are those of `Posterior.layer_means`. The language map, and
    the tokens that may be said, are in the metadata of the weights.
    """
    from peft import LoraConfig

    ranks = {name: group.rank for group in groups for name in group.modules}
    largest, scalings = max(ranks.values()), scalings_of(groups, alpha)
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    use_rslora = largest > 1 and all(
        math.isclose(group.relative_scaling, largest / math.sqrt(group.rank)) for group in groups
    )
    alphas = {
        name: scalings[group.key] * (math.sqrt(group.rank) if use_rslora else group.rank)
        for group in groups
        for name in group.modules
    }
    LoraConfig(  # task_type stays None: PEFT's SEQ_2_SEQ_LM wrapper does not take Whisper's inputs
        base_model_name_or_path=base,
        revision=revision,
        r=largest,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={
            name: one for name, one in alphas.items() if not math.isclose(one, alpha, rel_tol=1e-12)
        },
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
    metadata = {"format": "pt", **metadata_of(language_map, unsuppressed)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=metadata)
