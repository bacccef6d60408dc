"""Time of one adapted layer, forward and backward: the fused update against torch's operations.

    python benchmarks/layers.py --output benchmarks/results/layers.json

The peers, interleaved: PEFT's LoRA layer, the same written out in torch's operations with the
scaling in the addition, and `blora_pyro.low_rank`. Medians; ratios are to PEFT's.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from blora_pyro.low_rank import add_low_rank_update

# utterances, positions, in features, out features, rank: of the pocket Whisper, and of whisper-tiny
CASES = (
    (16, 150, 192, 192, 16),
    (16, 150, 192, 768, 16),
    (16, 150, 768, 192, 16),
    (4, 1500, 384, 384, 8),
    (4, 1500, 384, 1536, 8),
    (4, 1500, 1536, 384, 8),
    (4, 1500, 384, 384, 32),
)
PEFT, WRITTEN_OUT, FUSED = "PEFT", "written out", "fused"


def main() -> None:
    """Time every case, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for case in CASES:
        rows.append(measure(*case, repeats=arguments.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        write(arguments, rows)


def measure(n: int, length: int, ins: int, outs: int, rank: int, repeats: int) -> dict[str, Any]:
    """Median seconds of every peer, and ratios to PEFT's."""
    layer = nn.Linear(ins, outs).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    stock = PeftLinear(layer, "default", config, r=rank, lora_alpha=2 * rank)
    a, b = stock.lora_A["default"].weight, stock.lora_B["default"].weight
    x = torch.randn(n, length, ins, requires_grad=True)

    def written_out() -> Tensor:
        return torch.add(layer(x), linear(linear(x, a), b), alpha=2.0)

    def fused() -> Tensor:
        return add_low_rank_update(layer(x), x, layer.weight, a, b, 2.0)

    peers: dict[str, Callable[[], Tensor]] = {
        PEFT: lambda: stock(x),
        WRITTEN_OUT: written_out,
        FUSED: fused,
    }
    pull = torch.randn(n, length, outs)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(repeats + 3):
        for name, forward in peers.items():
            x.grad = a.grad = b.grad = None
            start = time.perf_counter()
            forward().backward(pull)
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(one) for name, one in times.items()}
    return {
        "shape": {"utterances": n, "positions": length, "in": ins, "out": outs, "rank": rank},
        "milliseconds": {name: round(1000 * one, 2) for name, one in medians.items()},
        "ratios": {name: round(one / medians[PEFT], 3) for name, one in medians.items()},
    }


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """JSON."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": {
            "processor": platform.machine(),
            "threads": arguments.threads,
            "torch": torch.__version__,
        },
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
