"""Time of one adapted layer, forward and backward: ours, PEFT's, and the update written out.

    python benchmarks/layers.py

Linear layers of whisper-tiny and -small, on as many rows as four windows of 30 s have in the
encoder (6,000) and four short transcripts in the decoder (120). A ratio is that to PEFT's layer.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from common import Results, parse, parser, print_table, race, shown
from contestants import PEER
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from blora_pyro.adapters import Adapters, Group

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
ROWS, RANKS = (6000, 120), (8, 32)
CALLS, SCALING = 4, 2.0  # in a round; of the update
FROZEN, OURS, WRITTEN_OUT = "frozen layer", "ours", "written out"


def main() -> None:
    """Measure each shape, and print a row for it."""
    arguments = parse(parser(__doc__))
    results = Results(arguments, calls=CALLS)
    cases = [*product(ROWS, SHAPES, RANKS)]
    table = []
    for rows, (outputs, inputs), rank in cases[:2] if arguments.quick else cases:
        name = f"{rows} rows, {inputs} to {outputs}, rank {rank}"
        rounds = 5 if arguments.quick else 12
        found = results.case(name, partial(measure, rows, outputs, inputs, rank, rounds))
        cells = [shown(found[one]["ratio"]) for one in (OURS, WRITTEN_OUT, FROZEN)]
        table.append((name, shown(found[PEER]["seconds"], ".2f", 1e3 / CALLS), *cells))
    print_table(("layer", f"{PEER}, ms", OURS, WRITTEN_OUT, FROZEN), table)


def measure(rows: int, outputs: int, inputs: int, rank: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of `CALLS` calls and their backward passes."""
    torch.manual_seed(0)
    x = torch.randn(4, rows // 4, inputs, requires_grad=True)
    a = (torch.randn(rank, inputs) / inputs).requires_grad_()
    b = torch.zeros(outputs, rank, requires_grad=True)
    frozen, adapted, rival = (frozen_layer(outputs, inputs) for _ in range(3))
    group = Group(("0",), outputs, inputs, rank)
    adapters = Adapters(adapted, (group,), SCALING * rank)
    adapters.put({group.A.name: a[None], group.B.name: b[None]})
    lora = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["0"])
    peft: Any = get_peft_model(rival, lora)

    def written_out(x: Tensor) -> Tensor:
        update = functional.linear(functional.linear(x, a), b)
        return frozen(x) + SCALING * update

    layers: dict[str, Callable[[Tensor], Tensor]] = {
        PEER: peft,
        OURS: adapted,
        WRITTEN_OUT: written_out,
        FROZEN: frozen,
    }
    gradient = torch.randn(4, rows // 4, outputs)

    def calls(layer: Callable[[Tensor], Tensor]) -> None:
        for _ in range(CALLS):
            layer(x).backward(gradient, retain_graph=True)
        x.grad = a.grad = b.grad = None

    steps = {name: partial(calls, layer) for name, layer in layers.items()}
    return race(steps, PEER, rounds)


def frozen_layer(outputs: int, inputs: int) -> nn.Sequential:
    """Return a layer by itself."""
    return nn.Sequential(nn.Linear(inputs, outputs)).requires_grad_(False)


if __name__ == "__main__":
    main()
