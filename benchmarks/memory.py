"""Peak memory of a step, ours and PEFT LoRA's, and the bytes on the disk for each stored moment.

    python benchmarks/memory.py

Every contestant runs in a process of its own: the most memory of three steps beyond what there was
before the first, on one window of 30 s; and of the decoder's layers, as a real base is fitted by
default, on eight windows, ours with the encoder's states from its cache. What a step of the latter
takes grows with layers times width of the decoder: the straight line through the three sizes,
float32, estimates large-v3. Files are those of whisper-tiny's shape: a posterior, a checkpoint to
resume from, and what PEFT and `Trainer` keep for the same two purposes; a float32 number for every
adapter weight is one moment.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, parse, parser, print_table
from contestants import CONTESTANTS, PEER, Ours, Peft, geometry, random_batch, random_net
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.fitting.checkpoints import write_checkpoint
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.options import DECODER
from blora_pyro.posterior import Family, Posterior

SIZES, RANKS, NAMES = ("tiny", "base", "small"), (8, 32), (PEER, "ours")
TARGETS = {ALL_LINEAR: 1, DECODER: 8}  # and windows at once
CACHED = [(size, 8, DECODER) for size in SIZES]
LARGE = "large-v3"
REPEATS = 2


def main() -> None:
    """Print both tables; with `--case`, measure one contestant in this process."""
    found = parser(__doc__)
    found.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parse(found)
    if arguments.case:
        size, rank, targets, name = arguments.case.split(";")
        print(peak(size, int(rank), targets, name))
        return
    results = Results(arguments, sizes=SIZES, ranks=RANKS, contestants=NAMES, repeats=REPEATS)
    rows = []
    every = [*product(SIZES, RANKS, [ALL_LINEAR]), *CACHED]
    for size, rank, targets in every[: 1 if arguments.quick else None]:
        measure = partial(peaks, arguments, size, rank, targets)
        case = results.case(title(size, rank, targets), measure)
        cells = [
            f"{one['largest']:,.0f} (least {min(one['mib']):,.0f}) ({one['ratio']:.2f})"
            for one in case.values()
        ]
        rows.append((size, what(targets), rank, *cells))
    print("peak MiB of a step (ratio to PEFT LoRA)")
    print_table(("size", "adapted", "rank", *NAMES), rows)
    if not arguments.quick:
        gib = estimate({one[0]: results.cases[title(*one)] for one in CACHED})
        results.write(estimates={LARGE: gib})
        print(
            f"{LARGE}, not measured: {gib['weights']:.1f} GiB of weights, {gib['step']:.1f} a step"
        )
    files = results.case("files", files_of_tiny)
    print(f"bytes on the disk, {files['adapter_weights']:,} adapter weights")
    rows = [
        (name, f"{one['bytes']:,}", one["moments"], f"{one['ratio_per_moment']:.3f}")
        for name, one in files["files"].items()
    ]
    print_table(("file", "bytes", "moments", "bytes a moment / those of PEFT's adapter"), rows)


def what(targets: str) -> str:
    """Return the adapted layers in words."""
    return targets if targets == ALL_LINEAR else "decoder, encoder cached"


def title(size: str, rank: int, targets: str) -> str:
    """Return the name of a case."""
    return f"{size}, {what(targets)}, rank {rank}"


def estimate(cases: dict[str, Any]) -> dict[str, float]:
    """Return the GiB that large-v3's float32 weights and a step of eight windows are to take.

    Args:
        cases: Of the smaller sizes, the decoder's layers adapted and the encoder cached.
    """

    def extent(config: WhisperConfig) -> int:
        return config.decoder_layers * config.d_model

    extents = [extent(geometry(size)) for size in cases]
    slope, rest = np.polyfit(extents, [one["ours"]["largest"] for one in cases.values()], 1)
    config = geometry(LARGE)
    with torch.device("meta"):
        weights = sum(one.numel() for one in WhisperForConditionalGeneration(config).parameters())
    return {"weights": 4 * weights / 2**30, "step": (slope * extent(config) + rest) / 2**10}


def peaks(arguments: argparse.Namespace, size: str, rank: int, targets: str) -> dict[str, Any]:
    """Return the peaks of every contestant, measured in turn."""
    mib: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in NAMES * (1 if arguments.quick else REPEATS):
        command = [sys.executable, __file__, "--threads", str(arguments.threads)]
        command += ["--case", f"{size};{rank};{targets};{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mib[name].append(json.loads(done.stdout.splitlines()[-1]))
    largest = {name: max(values) for name, values in mib.items()}
    return {
        name: {"mib": values, "largest": largest[name], "ratio": largest[name] / largest[PEER]}
        for name, values in mib.items()
    }


def peak(size: str, rank: int, targets: str, name: str) -> float:
    """Return the MiB that three steps take at most, beyond what is there before them."""
    config, windows = geometry(size), TARGETS[targets]
    one = CONTESTANTS[name](random_net(config), rank, targets, False)
    batch = random_batch(config, windows)
    if targets == DECODER and isinstance(one, Ours):
        batch = EncoderCache(one.model, windows)(batch, range(windows), 0)
    try:
        # Linux: forget the peak so far, otherwise that of making the net hides the steps'.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        print("the peak before the steps counts as what was there", file=sys.stderr)
    before = max_rss()
    with one.store_in_place():
        for _ in range(3):
            one.step(batch)
    return (max_rss() - before) / 2**20


def max_rss() -> int:
    """Return the peak resident memory, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def files_of_tiny() -> dict[str, Any]:
    """Return the sizes of files after one step."""
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
        # Two are what a user asks for, a mean and a deviation; the file also holds the guide.
        "ours: posterior.safetensors": (size["posterior.safetensors"], 2),
        "ours: checkpoint.safetensors": (size["checkpoint.safetensors"], 6),
    }
    files = {
        name: {"bytes": count, "moments": moments, "ratio_per_moment": count / moments / lora}
        for name, (count, moments) in found.items()
    }
    return {"adapter_weights": ours.model.num_weights, "files": files}


if __name__ == "__main__":
    main()
