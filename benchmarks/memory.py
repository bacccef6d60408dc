"""Peak memory of a step, ours and PEFT LoRA's, and what lies on the disk for each stored moment.

    python benchmarks/memory.py

Every contestant in a process of its own: the most memory of three steps beyond what there was
before the first, on one window of 30 s. Files are those of whisper-tiny's shape: a posterior,
a checkpoint to resume from, and what PEFT and `Trainer` keep for the same two purposes; a float32
number for every adapter weight is one moment.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, parse, parser, print_table
from contestants import (
    CONTESTANTS,
    PEER,
    Ours,
    Peft,
    geometry,
    random_batch,
    random_net,
)
from safetensors.torch import save_file

from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.fitting.checkpoints import write_checkpoint
from blora_pyro.posterior import Family, Posterior

SIZES = ("tiny", "base", "small")
RANKS = (8, 32)
NAMES = (PEER, "ours")
REPEATS = 2
MIB = 2**20


def main() -> None:
    """Both tables; with `--case` one contestant in this process."""
    found = parser(__doc__)
    found.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parse(found)
    if arguments.case:
        size, rank, name = arguments.case.split(";")
        print(json.dumps(peak(size, int(rank), name)))
        return
    results = Results(arguments, sizes=SIZES, ranks=RANKS, contestants=NAMES, repeats=REPEATS)
    rows = []
    for size in SIZES[:1] if arguments.quick else SIZES:
        for rank in RANKS[:1] if arguments.quick else RANKS:
            measure = partial(steps, arguments, size, rank)
            case = results.case(f"{size}, all-linear, rank {rank}", measure)
            cells = [
                f"{one['largest']:,.0f} (least {min(one['mib']):,.0f}) ({one['ratio']:.2f})"
                for one in case.values()
            ]
            rows.append((size, rank, *cells))
    print("\npeak MiB of a step (ratio to PEFT LoRA)")
    print_table(("size", "rank", *NAMES), rows)
    files = results.case("files", files_of_tiny)
    print(f"\nbytes on the disk, {files['adapter_weights']:,} adapter weights")
    heads = ("file", "bytes", "moments", "bytes a moment / those of PEFT's adapter")
    print_table(
        heads,
        [
            (name, f"{one['bytes']:,}", one["moments"], f"{one['ratio_per_moment']:.3f}")
            for name, one in files["files"].items()
        ],
    )


def steps(arguments: argparse.Namespace, size: str, rank: int) -> dict[str, Any]:
    """Peaks of every contestant, one after the other, again and again."""
    mib: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(1 if arguments.quick else REPEATS):
        for name in NAMES:
            command = [sys.executable, __file__, "--threads", str(arguments.threads)]
            command += ["--case", f"{size};{rank};{name}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            mib[name].append(json.loads(done.stdout.splitlines()[-1]))
    largest = {name: max(values) for name, values in mib.items()}
    return {
        name: {"mib": values, "largest": largest[name], "ratio": largest[name] / largest[PEER]}
        for name, values in mib.items()
    }


def peak(size: str, rank: int, name: str) -> float:
    """MiB that three steps take at most, beyond what is there before them."""
    config = geometry(size)
    one = CONTESTANTS[name](random_net(config), rank, ALL_LINEAR, False)
    batch = random_batch(config, 1)
    try:
        # Linux: the peak so far is forgotten, lest that of making the net hides the steps'.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        print("the peak before the steps counts as what was there", file=sys.stderr)
    before = max_rss()
    with one.store_in_place():
        for _ in range(3):
            one.step(batch)
    return (max_rss() - before) / MIB


def max_rss() -> int:
    """Peak resident memory, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def files_of_tiny() -> dict[str, Any]:
    """Sizes of files after one step."""
    net, rank = random_net(geometry("tiny")), 8
    batch = random_batch(geometry("tiny"), 1)
    ours, peft = Ours(net, rank, ALL_LINEAR, False), Peft(net, rank, ALL_LINEAR, False)
    for one in (ours, peft):
        with one.store_in_place():
            one.step(batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Posterior.from_guide("tiny", ours.model, ours.guide, Family()).save(folder)
        write_checkpoint(folder / "checkpoint.safetensors", ours.loop._state())
        tensors = {n: p.detach() for n, p in peft.net.named_parameters() if p.requires_grad}
        save_file(tensors, folder / "peft.safetensors")
        torch.save(peft.optimizer.state_dict(), folder / "optimizer.pt")
        size = {path.name: path.stat().st_size for path in folder.iterdir()}
    lora = size["peft.safetensors"]
    found = {
        "PEFT: adapter": (lora, 1),
        "PEFT: adapter and Adam, to resume": (lora + size["optimizer.pt"], 3),
        "ours: adapter_model.safetensors": (size["adapter_model.safetensors"], 1),
        # Two are what a user asks for, a mean and a deviation; the file holds the guide as well.
        "ours: posterior.safetensors": (size["posterior.safetensors"], 2),
        "ours: checkpoint.safetensors": (size["checkpoint.safetensors"], 6),
    }
    return {
        "adapter_weights": ours.model.num_weights,
        "files": {
            name: {"bytes": count, "moments": moments, "ratio_per_moment": count / moments / lora}
            for name, (count, moments) in found.items()
        },
    }


if __name__ == "__main__":
    main()
