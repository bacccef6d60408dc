"""What of a step is ours and not the net's: against depth, and against the number of weights.

    python benchmarks/overhead.py

`depth`: a Whisper of width 16, up to the 32 + 32 layers of large-v3, all 512 linear layers adapted:
what is left is Python. "Without the net" is our step with the net replaced by a sum over all
factors: draw, program, KL, their backward pass, Adam and all that the loop does. Beside it
the same of plain LoRA (a parameter a matrix, Adam), and whole steps.

`width`: factors of real size, without a net. Time per adapter weight, and against copying our
parameters (two a weight) once, as the least that a step could do.
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from common import Results, parse, parser, print_table, race, shown
from contestants import (
    BETA,
    CONTESTANTS,
    FOREVER,
    LR,
    PEER,
    PRIOR_SCALE,
    Ours,
    geometry,
    random_batch,
    random_net,
)
from torch import nn
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import ALL_LINEAR, Group, find_targets, projections
from blora_pyro.data import Batch
from blora_pyro.fitting.checkpoints import Checkpoints
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.svi import Trainer
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import FactorPrior, Prediction
from blora_pyro.options import FittingOptions

DEPTHS = (1, 2, 4, 8, 16, 32)
WIDTHS = (("tiny", 8), ("tiny", 32), ("small", 8), ("small", 32), ("large-v3", 8), ("large-v3", 32))
THIN = {
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "vocab_size": 64,
    "max_source_positions": 4,
    "max_target_positions": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}
RANK = 4
PLAIN, COPY = "plain LoRA", "copying the parameters"
NOTHING = Batch(torch.zeros(1, 1, 1), torch.zeros(1, 1).long(), torch.zeros(1, 1).long())


def main() -> None:
    """Print both tables."""
    arguments = parse(parser(__doc__))
    results = Results(arguments, depths=DEPTHS, widths=WIDTHS)
    depth(arguments, results)
    width(arguments, results)


def depth(arguments: argparse.Namespace, results: Results) -> None:
    """Print milliseconds against the number of adapted layers."""
    rounds, rows = 3 if arguments.quick else 30, []
    for layers in DEPTHS[:2] if arguments.quick else DEPTHS:
        found = results.case(f"depth {layers}", partial(measure_depth, layers, rounds))
        bare, whole = found["without the net"], found["whole steps"]
        milliseconds = [bare[name] for name in ("ours", "ours, point", PLAIN)]
        milliseconds += [whole[name] for name in ("ours", PEER, "AutoNormal, a site a matrix")]
        cells = [shown(one["seconds"], ".1f", 1e3) for one in milliseconds]
        rows.append((f"{layers} + {layers}", found["adapted_layers"], *cells))
    heads = ("layers", "adapted", "ours", "ours, point", PLAIN)
    whole_heads = ("whole step, ours", f"whole step, {PEER}", "whole step, a site a matrix")
    print("\nmilliseconds; the first three without the net")
    print_table((*heads, *whole_heads), rows)


def measure_depth(layers: int, rounds: int) -> dict[str, Any]:
    """Return the time of steps on very thin layers, without the net and with it."""
    config = geometry("tiny", **THIN, encoder_layers=layers, decoder_layers=layers)
    net, batch = random_net(config), random_batch(config, size=1, length=8)
    torch.manual_seed(1)
    bare: dict[str, Any] = {
        name: silent(CONTESTANTS[name](net, RANK, ALL_LINEAR, False))
        for name in ("ours", "ours, point")
    }
    linear = bare["ours"].layers.values()
    shapes = [(RANK, one.in_features) for one in linear]
    shapes += [(one.out_features, RANK) for one in linear]
    steps = {name: partial(one.step, NOTHING) for name, one in bare.items()}
    whole = {name: one(net, RANK, ALL_LINEAR, False) for name, one in CONTESTANTS.items()}
    return {
        "adapted_layers": len(linear),
        "without the net": timed({**steps, PLAIN: plain_lora(shapes)}, rounds, PLAIN),
        "whole steps": timed(
            {name: partial(one.step, batch) for name, one in whole.items()}, rounds, PEER
        ),
    }


def timed(steps: dict[str, Callable[[], object]], rounds: int, peer: str) -> dict[str, Any]:
    """Return the time of all, each in a parameter store of its own."""
    stores: dict[str, Any] = {name: {"params": {}, "constraints": {}} for name in steps}
    inside = lambda name: pyro.get_param_store().scope(stores[name])  # noqa: E731
    return race(steps, peer, rounds, inside=inside)


def silent(ours: Any) -> Ours:
    """Return the same with a sum over all factors in the place of its net."""
    adapters = ours.model.adapters

    def likelihood(batch: Batch) -> Prediction:
        maps = [one for pair in adapters._projections.values() for one in pair]
        total = sum((one.weight.sum() for one in maps), torch.zeros(()))
        return Prediction(total.expand(*batch.decoder_input_ids.shape, 2), {})

    ours.model.likelihood = likelihood
    return ours


def plain_lora(shapes: list[tuple[int, int]]) -> Callable[[], object]:
    """Return a step of LoRA without its net: a sum over all factors, backward, Adam."""
    factors = [nn.Parameter(torch.randn(shape) / 100) for shape in shapes]
    optimizer = torch.optim.Adam(factors, lr=LR, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = sum((one.sum() for one in factors), torch.zeros(()))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


class Alone(FactorPrior):
    """The latent part of the program, and in place of a net a sum over all factors."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        """Set the default prior."""
        device = torch.device("cpu")
        super().__init__(groups, build_prior("normal", scale=PRIOR_SCALE), device)
        self.net = SimpleNamespace(device=device, dtype=torch.float32)

    def __call__(self, *batch: object) -> None:
        """Draw, split into layers, and observe."""
        maps: list[Any] = [one for factor in self.draw().values() for one in projections(factor)]
        total = sum((one.weight.sum() for one in maps), torch.zeros(()))
        pyro.factor("tokens", -total)


def width(arguments: argparse.Namespace, results: Results) -> None:
    """Print nanoseconds per adapter weight."""
    rounds, rows = 3 if arguments.quick else 20, []
    for size, rank in WIDTHS[:1] if arguments.quick else WIDTHS:
        case = f"width {size}, rank {rank}"
        found = results.case(case, partial(measure_width, size, rank, rounds))
        per_weight = 1e9 / found["adapter_weights"]
        names = ("ours", "ours, point", PLAIN, COPY)
        cells = [shown(found[name]["seconds"], ".2f", per_weight) for name in names]
        weights = f"{found['adapter_weights']:,}"
        rows.append((case, weights, *cells, shown(found["ours"]["ratio"], ".1f")))
    print("\nnanoseconds per adapter weight, without a net")
    print_table(("case", "weights", "ours", "ours, point", PLAIN, COPY, "ours / copying"), rows)


def measure_width(size: str, rank: int, rounds: int) -> dict[str, Any]:
    """Return the time of steps without a net on factors of real size."""
    model: Any = Alone(groups_of(size, rank))
    torch.manual_seed(1)
    steps: dict[str, Callable[[], object]] = {}
    for name, guide_name, beta in (("ours", "normal", BETA), ("ours, point", "point", 0.0)):
        guide: Any = build_guide(guide_name, model)
        options = FittingOptions(beta=beta, lr=LR, steps=FOREVER, batch_size=1)
        steps[name] = partial(
            Trainer(model, guide, options, Checkpoints(None), None, Processes()).step, NOTHING
        )
    steps[PLAIN] = plain_lora([site.shape[1:] for site in model.sites for _ in site.modules])
    source = torch.zeros(2 * model.num_weights)
    steps[COPY] = partial(torch.empty_like(source).copy_, source)
    return {"adapter_weights": model.num_weights, **timed(steps, rounds, COPY)}


def groups_of(size: str, rank: int) -> tuple[Group, ...]:
    """Return the groups of all linear layers, whose weights are not made."""
    with torch.device("meta"):
        net = WhisperForConditionalGeneration(geometry(size))
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, layer in find_targets(net, ALL_LINEAR).items():
        shapes.setdefault((layer.out_features, layer.in_features), []).append(name)
    return tuple(Group(tuple(names), *shape, rank) for shape, names in shapes.items())


if __name__ == "__main__":
    main()
