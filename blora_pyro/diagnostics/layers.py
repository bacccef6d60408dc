"""Where in Whisper an adapted layer sits, by its name, and figures by kind of layer."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from blora_pyro.diagnostics.summaries import FactorSummary, Summary

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_PARTS = ("encoder", "decoder", "cross", "other")
_NAME = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(?:(\w+_attn)\.)?(\w+)")


@dataclass(frozen=True)
class LayerPosition:
    """Where a layer sits.

    Attributes:
        part: `encoder`, `decoder`, or `cross` for the decoder's attention to the encoder.
        layer: Number of the block in its stack, from 0; -1 outside of the stacks.
        projection: One of `PROJECTIONS`, or another last name.
    """

    part: str
    layer: int
    projection: str

    @classmethod
    def of(cls, module: str) -> "LayerPosition":
        """Return the position of a layer, such as `model.decoder.layers.0.encoder_attn.q_proj`."""
        match = _NAME.search(module)
        if match is None:
            return cls("other", -1, module.rpartition(".")[2])
        stack, layer, attention, projection = match.groups()
        return cls("cross" if attention == "encoder_attn" else stack, int(layer), projection)

    @property
    def kind(self) -> str:
        """Part and projection, `cross q_proj`, which layers of all depths share."""
        return f"{self.part} {self.projection}"

    @property
    def block(self) -> str:
        """The block that the layer is in, `decoder 0`."""
        stack = "decoder" if self.part == "cross" else self.part
        return stack if self.layer < 0 else f"{stack} {self.layer}"

    @property
    def column(self) -> str:
        """A short name within the block, `cross q` or `fc1`."""
        name = self.projection.removesuffix("_proj")
        return f"cross {name}" if self.part == "cross" else name

    @property
    def label(self) -> str:
        """A short name of the layer, `decoder 0 cross q`."""
        return f"{self.block} {self.column}"

    @property
    def order(self) -> tuple[int, ...]:
        """Key that sorts by stack, block, and the order of computation within a block."""
        stack = ("encoder", "decoder", "other").index(self.block.partition(" ")[0])
        return (stack, self.layer, *self.order_in_block)

    @property
    def order_in_block(self) -> tuple[int, ...]:
        """Key that sorts a block: self-attention, cross-attention, fc1 and fc2."""
        feed_forward = self.projection in ("fc1", "fc2")
        names = (*PROJECTIONS, self.projection)
        return feed_forward, _PARTS.index(self.part), names.index(self.projection)


def layer_kinds(modules: Iterable[str]) -> list[str]:
    """Return the kinds of some layers, each once: encoder, decoder, cross-attention."""
    positions = {one.kind: one for one in map(LayerPosition.of, modules)}
    return sorted(
        positions, key=lambda kind: (_PARTS.index(kind.split()[0]), positions[kind].order_in_block)
    )


def layer_grid(
    modules: Iterable[str],
) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Return blocks by depth, columns in the order of computation, and each layer's place."""
    positions = {module: LayerPosition.of(module) for module in modules}
    by_depth = sorted(positions.values(), key=lambda one: one.order)
    blocks = list(dict.fromkeys(one.block for one in by_depth))
    by_column = sorted(positions.values(), key=lambda one: one.order_in_block)
    columns = list(dict.fromkeys(one.column for one in by_column))
    spots = {
        module: (blocks.index(one.block), columns.index(one.column))
        for module, one in positions.items()
    }
    return blocks, columns, spots


@dataclass(frozen=True)
class KindSummary:
    """Layers of one kind, such as `decoder q_proj`, together; None is a figure that they lack.

    Attributes:
        layers: Number of layers.
        contraction: By factor, mean over the layers that are no points.
        signal_to_noise: By factor, median over the layers that are no points.
        near_zero: Share of the elements of A and B with |mean| < 1e-3.
        kl: By factor, nats.
        kl_share: Share in the posterior's whole KL.
        kl_per_weight: KL of A and B over their number of weights, nats.
        effective_rank: Mean over the layers.
        directions: Directions of ΔW above their standard deviation, mean over the layers.
        relative_norm: Norm of ΔW over that of the frozen weight, mean over the layers.
        active_ranks: By factor, mean over the layers.
    """

    kind: str
    layers: int
    contraction: dict[str, float | None]
    signal_to_noise: dict[str, float | None]
    near_zero: float
    kl: dict[str, float | None]
    kl_share: float | None
    kl_per_weight: float | None
    effective_rank: float
    directions: float | None
    relative_norm: float | None
    active_ranks: dict[str, float | None]


def summarise_kinds(summary: Summary) -> tuple[KindSummary, ...]:
    """Return the figures of every kind of layer, encoder first."""
    whole = summary.kl if summary.kl_by_module() else None
    kinds = layer_kinds(row.module for row in summary.updates)
    return tuple(_summarise_kind(kind, summary, whole) for kind in kinds)


def _summarise_kind(kind: str, summary: Summary, whole: float | None) -> KindSummary:
    factors = [row for row in summary.factors if LayerPosition.of(row.module).kind == kind]
    updates = [row for row in summary.updates if LayerPosition.of(row.module).kind == kind]
    random = [row for row in factors if row.kl is not None]
    random_weights = sum(row.weights for row in random)
    kl = _by_factor(sum, random, "kl")
    total = sum(value or 0.0 for value in kl.values())
    weights = sum(row.weights for row in factors)
    return KindSummary(
        kind=kind,
        layers=len(updates),
        contraction=_by_factor(fmean, random, "contraction"),
        signal_to_noise=_by_factor(median, random, "signal_to_noise"),
        near_zero=sum(row.near_zero * row.weights for row in factors) / weights,
        kl=kl,
        kl_share=total / whole if whole else None,
        kl_per_weight=total / random_weights if random else None,
        effective_rank=fmean(row.effective_rank for row in updates),
        directions=_over(fmean, (row.directions for row in updates if any(row.singular_stddevs))),
        relative_norm=_over(fmean, (row.relative_norm for row in updates)),
        active_ranks=_by_factor(fmean, factors, "active_ranks"),
    )


def _by_factor(
    function: Callable[[list[float]], float], rows: list[FactorSummary], name: str
) -> dict[str, float | None]:
    """Return a function of one figure of all rows of A, and of B."""
    return {
        factor: _over(function, (getattr(row, name) for row in rows if row.factor == factor))
        for factor in ("A", "B")
    }


def _over(function: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """Return a function of the known values, or None if there are none."""
    known = [value for value in values if value is not None]
    return function(known) if known else None
