"""Target layers, stacked by shape, and the hooks that add sampled low-rank updates to them.

Every target layer with frozen weight `W0` (d_out, d_in) computes
`x W0ᵀ + (alpha / rank) · (x Aᵀ) Bᵀ`, that is, `W0 + (alpha / rank) · B A` (Hu et al., LoRA,
arXiv 2106.09685). Layers of one shape form a `Group`, and all their A (or B) are one `Site`: one
tensor, one Pyro sample statement, however deep the model is.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

import pyro
import regex
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from blora_pyro.errors import UserError, reason
from blora_pyro.low_rank import add_low_rank_update

Factors = Mapping[str, Tensor]
Projection = Callable[[Tensor], Tensor]

ALL_LINEAR = "all-linear"
SAME_WEIGHTS = 1e-3  # relative difference of standard deviations, for another dtype's rounding
LONGEST_PATTERN, MOST_REPEATS = 1000, 1000  # characters; product of all numbers in braces
PATTERN_SECONDS = 2.0
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")


@dataclass(frozen=True)
class Site:
    """The factor A, or B, of every layer of one group, as one latent tensor.

    Attributes:
        name: Pyro's site name, such as `A_192x768` (out x in features).
        factor: `"A"` or `"B"`.
        modules: Names of the layers along the first dimension.
        shape: (modules, rank, in_features) for A, (modules, out_features, rank) for B.
        weight_stddevs: Standard deviation of each layer's frozen weight; empty if not known.
    """

    name: str
    factor: Literal["A", "B"]
    modules: tuple[str, ...]
    shape: tuple[int, int, int]
    weight_stddevs: tuple[float, ...] = ()

    @property
    def dims(self) -> tuple[str, str, str]:
        """Names of the dimensions of `shape`."""
        inner = ("rank", "in_feature") if self.factor == "A" else ("out_feature", "rank")
        return ("module", *inner)

    @property
    def rank_shape(self) -> tuple[int, int]:
        """Shape of one value per layer and rank: (modules, rank)."""
        return self.shape[0], self.shape[self.dims.index("rank")]

    def per_rank(self, values: Tensor) -> Tensor:
        """Reshape values of `rank_shape` to broadcast against `shape`."""
        return values.unsqueeze(-1 if self.factor == "A" else -2)


@dataclass(frozen=True)
class Group:
    """Target layers of one shape and rank.

    Attributes:
        modules: Names of the layers.
        rank: Rank of each layer's update.
        weight_stddevs: Standard deviation of each layer's frozen weight; empty if not known.
        suffix: Tells groups of one shape apart, where ranks differ (`_r4` after pruning).
        relative_scaling: Factor on alpha / largest rank, which gives the updates' scaling: other
            than 1 with rsLoRA, or where ranks are chosen by pattern.
    """

    modules: tuple[str, ...]
    out_features: int
    in_features: int
    rank: int
    weight_stddevs: tuple[float, ...] = ()
    suffix: str = ""
    relative_scaling: float = 1.0

    @property
    def key(self) -> str:
        """The shape, `out_features x in_features`, as used in site names."""
        return f"{self.out_features}x{self.in_features}{self.suffix}"

    @property
    def A(self) -> Site:
        """The stacked A, (modules, rank, in_features)."""
        shape = (len(self.modules), self.rank, self.in_features)
        return Site(f"A_{self.key}", "A", self.modules, shape, self.weight_stddevs)

    @property
    def B(self) -> Site:
        """The stacked B, (modules, out_features, rank)."""
        shape = (len(self.modules), self.out_features, self.rank)
        return Site(f"B_{self.key}", "B", self.modules, shape, self.weight_stddevs)

    @property
    def sites(self) -> tuple[Site, Site]:
        """A and B."""
        return self.A, self.B

    def plate(self) -> pyro.plate:
        """Return a plate over the layers, at dim -1 of the batch shape."""
        return pyro.plate(f"modules_{self.key}", len(self.modules), dim=-1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name; a relative scaling of 1 is left out, as it used to be."""
        stored = asdict(self)
        if self.relative_scaling == 1:
            del stored["relative_scaling"]
        return stored


def scalings_of(groups: Iterable[Group], alpha: float) -> dict[str, float]:
    """Return the factor s in ΔW = s · B A of every group, by key."""
    groups = tuple(groups)
    common = alpha / max((group.rank for group in groups), default=1)
    return {group.key: common * group.relative_scaling for group in groups}


def whole_match(pattern: str, shown: str = "") -> Callable[[str], bool]:
    """Return whether a whole name matches a regular expression, as in PEFT, within bounds.

    The expression may be anyone's: its length and counted repeats are bounded, which its compiler
    writes out, and so is the time that it takes for all names together. Errors call it `shown`.

    Raises:
        UserError: If it is no regular expression or beyond the bounds; also as it is called.
    """
    shown, left = shown or f"target modules '{pattern:.80}'", PATTERN_SECONDS
    repeats = (float(one) for one in re.findall(r"\d+", "".join(re.findall(r"{[^}]*", pattern))))
    if len(pattern) > LONGEST_PATTERN or math.prod(one or 1 for one in repeats) > MOST_REPEATS:
        raise UserError(f"{shown} is too large a regex; give a simpler one, or names of layers")
    try:
        re.compile(pattern)  # else what only the package `regex` knows would do something else
        compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"{shown} is no regex: {reason(error)}") from None

    def matches(name: str) -> bool:
        nonlocal left
        started = time.monotonic()
        try:
            found = compiled.fullmatch(name, timeout=left)
        except TimeoutError:
            found, left = None, 0.0
        left -= time.monotonic() - started
        if left <= 0:
            raise UserError(f"{shown} takes too long; give a simpler regex, or names of layers")
        return found is not None

    return matches


def match_names(names: Iterable[str], pattern: str, what: str = "target modules") -> list[str]:
    """Return the names that a pattern matches: comma-separated suffixes, or a regex of whole names.

    Errors call the pattern `what`.

    Raises:
        UserError: If the pattern has characters of a regular expression, but is not one, or takes
            too long.
    """
    if _REGEX_SIGNS.search(pattern):
        return [*filter(whole_match(pattern, f"{what} '{pattern:.80}'"), names)]
    suffixes = [suffix.strip() for suffix in pattern.split(",")]
    return [
        name
        for name in names
        if any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
    ]


def find_targets(
    net: nn.Module,
    target_modules: str,
    exclude_modules: str | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, nn.Linear]:
    r"""Return the linear layers that are to be adapted, in the order of the net.

    Args:
        net: A Whisper.
        target_modules: As in PEFT: `"all-linear"` (every linear layer but the output layer),
            comma-separated suffixes (`"q_proj,v_proj"`), or a regular expression that matches the
            whole name (`r".*decoder.*\.fc[12]"`).
        exclude_modules: Those of them to leave out: suffixes, or a regular expression.
        layers: Only those inside blocks of these numbers, counted from 0 in encoder and decoder;
            None is all.

    Raises:
        UserError: If nothing matches, nothing is left, or a regular expression is not one.
    """
    found = _matching(net, target_modules)
    out = {*match_names(found, exclude_modules, "exclude modules")} if exclude_modules else set()
    if exclude_modules and not out:
        raise UserError(
            f"exclude modules '{exclude_modules}' match none of the {len(found)} target modules"
            f"{_near(found, exclude_modules)}; give names or a regex of some, or leave them out"
        )
    numbers = {name: block_number(name) for name in found}
    if layers is not None and (unknown := {*layers} - {*numbers.values()}):
        known = sorted({one for one in numbers.values() if one is not None})
        raise UserError(
            f"layers has {min(unknown)}, and the target modules are in layers "
            f"{', '.join(map(str, known))}; give some of those"
        )
    left = {
        name: module
        for name, module in found.items()
        if name not in out and (layers is None or numbers[name] in layers)
    }
    if not left:
        raise UserError(
            f"exclude modules '{exclude_modules}' leave none of the target modules "
            f"'{target_modules}'; exclude fewer"
        )
    return left


def block_number(name: str) -> int | None:
    """Return the number of the block that a layer is in, its first numbered part, as PEFT does."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return None if match is None else int(match[1])


def _matching(net: nn.Module, target_modules: str) -> dict[str, nn.Linear]:
    """Return the linear layers that `target_modules` matches, in the order of the net."""
    output_layer = net.get_output_embeddings()  # type: ignore[operator]
    linear = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    }
    if target_modules == ALL_LINEAR:
        return linear
    found = {name: linear[name] for name in match_names(linear, target_modules)}
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        near = _near(linear, target_modules)
        raise UserError(
            f"target modules '{target_modules}' match no linear layer{near}; "
            f"give 'all-linear', a regex of whole names, or some of: {known}"
        )
    return found


def _near(names: Iterable[str], pattern: str) -> str:
    """Return what a pattern that matches no name is near to, in words for a message."""
    if not _REGEX_SIGNS.search(pattern):
        leaves = {name.rpartition(".")[2] for name in names}
        near = [get_close_matches(one.strip(), leaves, n=1) for one in pattern.split(",")]
        found = ", ".join(dict.fromkeys(name for one in near for name in one))
        return f" (did you mean {found}?)" if found else ""
    try:
        parts = [*filter(whole_match(f".*(?:{pattern}).*"), names)]
    except UserError:  # it takes too long, or can be no part of another
        return ""
    if not parts:
        return ""
    return (
        f" by its whole name, but part of {len(parts)}, such as {parts[0]} (did you mean "
        f"'.*{pattern}.*'?)"
    )


def group_by_shape(
    targets: Mapping[str, nn.Linear],
    rank: int,
    rank_pattern: Mapping[str, int] | None = None,
    use_rslora: bool = False,
) -> tuple[Group, ...]:
    """Group layers of equal (out_features, in_features) and rank, in order of first appearance.

    With an alpha updates are scaled as in PEFT: by alpha / rank, that of the layer itself, or with
    rsLoRA (Kalajdzievski, arXiv 2312.03732) by alpha / √rank.

    Args:
        targets: Layers by name.
        rank: Rank of every layer that no pattern matches.
        rank_pattern: End of a name, or regular expression of one -> rank; the first match counts.
        use_rslora: Scale by alpha / √rank.

    Raises:
        UserError: If a rank is below 1 or above the smallest dimension of its layers, or a pattern
            matches no layer.
    """
    ranks = _ranks(targets, rank, rank_pattern or {})
    shapes: dict[tuple[int, int, int], list[str]] = {}
    for name, module in targets.items():
        shape = module.out_features, module.in_features
        if not 1 <= ranks[name] <= min(shape):
            of = f" of {name}" if rank_pattern else ""
            largest = min(shape) if rank_pattern else _smallest(targets)
            raise UserError(
                f"rank {ranks[name]}{of} is not possible here; give one from 1 to {largest}"
            )
        shapes.setdefault((*shape, ranks[name]), []).append(name)

    def stddev(layer: nn.Linear) -> float:
        return layer.weight.detach().float().std(correction=0).item()

    largest, same = max(ranks.values()), [shape[:2] for shape in shapes]
    return tuple(
        Group(
            tuple(names),
            *shape,
            tuple(stddev(targets[name]) for name in names),
            f"_r{shape[2]}" if same.count(shape[:2]) > 1 else "",
            largest / (math.sqrt(shape[2]) if use_rslora else shape[2]),
        )
        for shape, names in shapes.items()
    )


def _smallest(targets: Mapping[str, nn.Linear]) -> int:
    return min(min(module.weight.shape) for module in targets.values())


def _ranks(targets: Iterable[str], rank: int, rank_pattern: Mapping[str, int]) -> dict[str, int]:
    """Return the rank of every layer, by the first pattern that matches it, as in PEFT."""
    ranks, matches = dict.fromkeys(targets, rank), {}
    for pattern in rank_pattern:
        is_match = whole_match(rf"(.*\.)?({pattern})", f"rank pattern '{pattern:.80}'")
        matches[pattern] = [name for name in ranks if is_match(name)]
        if not matches[pattern]:
            raise UserError(
                f"rank pattern '{pattern:.80}' matches none of the {len(ranks)} target modules"
                f"{_near(ranks, pattern)}; give the end of a name such as "
                "encoder_attn.q_proj, or a regex of it"
            )
    for pattern, names in reversed(matches.items()):  # the first is to count
        ranks.update(dict.fromkeys(names, rank_pattern[pattern]))
    return ranks


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The `Projection` x -> x wᵀ of one factor, the same for every row of x."""

    weight: Tensor  # (out, in)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        return functional.linear(x, self.weight.to(x.dtype))


@dataclass(frozen=True, eq=False)
class RowMap:
    """The `Projection` x_i -> x_i w[rows_i]ᵀ of utterance i, for a batch of several domains."""

    weights: Tensor  # (domains, out, in)
    rows: Tensor  # (batch,), int64: the domain of each utterance

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, tokens, in) -> (batch, tokens, out), in the dtype of x."""
        return torch.bmm(x, self.weights.to(x.dtype).index_select(0, self.rows).mT)


@effectful(type="project")
def projections(factor: Tensor) -> list[Projection]:
    """Return the map x -> x wᵀ of every layer of a stacked factor (modules, out, in), in order.

    A Pyro primitive, so that an effect handler can replace the maps of a factor whose draw it has
    seen by noisier ones (see `models.estimators`).
    """
    return [LinearMap(weight) for weight in factor.unbind(0)]


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity among values, in one pass and without a copy."""
    if not values.is_floating_point() or not values.numel():
        return not values.is_complex()
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


class _Hook:
    """Forward hook that adds a layer's update to its output."""

    def __init__(self, adapters: "Adapters", name: str) -> None:
        self.adapters, self.name = adapters, name

    @property
    def is_active(self) -> bool:
        return self.name in self.adapters._projections

    def __call__(
        self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if not self.is_active:
            return None
        (x,) = inputs
        down, up = self.adapters._projections[self.name]
        scaling = self.adapters.scaling_of_layer[self.name]
        if (
            isinstance(down, LinearMap)
            and isinstance(up, LinearMap)
            and self._is_only_change(layer)
        ):
            return add_low_rank_update(output, x, layer.weight, down.weight, up.weight, scaling)
        update = up(down(x))
        return torch.add(output, update.to(output.dtype), alpha=scaling)

    def _is_only_change(self, layer: nn.Linear) -> bool:
        """Return whether the layer is frozen, and its output `x weightᵀ + bias` so far."""
        is_frozen = not any(part.requires_grad for part in layer.parameters())
        others = (hook for hook in layer._forward_hooks.values() if hook is not self)
        are_idle = all(isinstance(hook, _Hook) and not hook.is_active for hook in others)
        return type(layer) is nn.Linear and is_frozen and are_idle


class Adapters:
    """Low-rank updates of the target layers of a net, by forward hooks.

    The net keeps its modules, names and weights. Factors are active from `put` until the next `put`
    or `clear`, so that a backward pass with gradient checkpointing uses those of its forward pass.
    """

    def __init__(self, net: nn.Module, groups: tuple[Group, ...], alpha: float) -> None:
        """Register the hooks, without factors yet.

        Args:
            net: The module that holds the layers.
            groups: From `group_by_shape`, or from a saved posterior.
            alpha: Updates are scaled by `alpha / largest rank`, times the relative scaling.

        Raises:
            UserError: If the net lacks a layer, or one has another shape.
        """
        self.groups = groups
        self.scalings = scalings_of(groups, alpha)
        self.scaling_of_layer = {
            name: self.scalings[group.key] for group in groups for name in group.modules
        }
        self._projections: dict[str, tuple[Projection, Projection]] = {}
        modules = dict(net.named_modules())
        layers = {}
        for group in groups:
            for name in group.modules:
                module = modules.get(name)
                expected = (group.out_features, group.in_features)
                if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != expected:
                    raise UserError(
                        f"the base model has no linear layer {name} of shape {group.key}; "
                        "give the base model that the adapter was fitted on"
                    )
                layers[name] = module
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_hook(_Hook(self, name)) for name, layer in layers.items()
        ]

    def put(self, factors: Factors, rows: Tensor | None = None) -> None:
        """Activate the factors of every site.

        Args:
            factors: Site name -> tensor of the site's shape; with `rows` those of several domains,
                (domains, *shape).
            rows: (batch,), the domain of each utterance of the next batch.
        """

        def maps(factor: Tensor) -> Sequence[Projection]:
            if rows is None:
                return projections(factor)
            return [RowMap(weights, rows) for weights in factor.unbind(1)]

        for group in self.groups:
            pairs = zip(*(maps(factors[site.name]) for site in group.sites), strict=True)
            self._projections.update(zip(group.modules, pairs, strict=True))

    def clear(self) -> None:
        """Deactivate the factors: the net is the frozen base again."""
        self._projections.clear()

    @contextmanager
    def using(self, factors: Factors) -> Iterator[None]:
        """Activate `factors` inside a `with`."""
        self.put(factors)
        try:
            yield
        finally:
            self.clear()

    def remove(self) -> None:
        """Remove the hooks from the net."""
        self.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
