"""Where in Whisper an adapted layer sits, told from its name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_PARTS = ("encoder", "decoder", "cross", "other")
_NAME = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(?:(\w+_attn)\.)?(\w+)")


@dataclass(frozen=True)
class Place:
    """A layer's place.

    Attributes:
        part: `encoder`, `decoder`, or `cross` for the decoder's attention to the encoder.
        layer: Number of the block in its stack, from 0; -1 outside of the stacks.
        projection: `q_proj`, `k_proj`, `v_proj`, `out_proj`, `fc1`, `fc2`, or another last name.
    """

    part: str
    layer: int
    projection: str

    @classmethod
    def of(cls, module: str) -> "Place":
        """The place of a layer, such as `model.decoder.layers.0.encoder_attn.q_proj`."""
        match = _NAME.search(module)
        if match is None:
            return cls("other", -1, module.rpartition(".")[2])
        stack, layer, attention, projection = match.groups()
        return cls("cross" if attention == "encoder_attn" else stack, int(layer), projection)

    @property
    def kind(self) -> str:
        """Part and projection, `cross q_proj`: what layers of all depths have in common."""
        return f"{self.part} {self.projection}"

    @property
    def block(self) -> str:
        """The block that it is in, `decoder 0`."""
        stack = "decoder" if self.part == "cross" else self.part
        return stack if self.layer < 0 else f"{stack} {self.layer}"

    @property
    def column(self) -> str:
        """Its name within the block in a few letters, `cross q` or `fc1`."""
        name = self.projection.removesuffix("_proj")
        return f"cross {name}" if self.part == "cross" else name

    @property
    def label(self) -> str:
        """All of it in a few letters: `decoder 0 cross q`."""
        return f"{self.block} {self.column}"

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts by stack, block, and the way that data takes through a block."""
        stack = ("encoder", "decoder", "other").index(self.block.partition(" ")[0])
        return (stack, self.layer, *self.order_in_block)

    @property
    def order_in_block(self) -> tuple[int, ...]:
        """Sorts the layers of a block: its own attention, that to the encoder, fc1 and fc2."""
        feed_forward = self.projection in ("fc1", "fc2")
        names = (*PROJECTIONS, self.projection)
        return feed_forward, _PARTS.index(self.part), names.index(self.projection)


def kinds(modules: Iterable[str]) -> list[str]:
    """The kinds of some layers, each once: encoder, decoder, cross-attention."""
    places = {place.kind: place for place in map(Place.of, modules)}
    key = lambda place: (_PARTS.index(place.part), place.order_in_block)  # noqa: E731
    return [place.kind for place in sorted(places.values(), key=key)]
