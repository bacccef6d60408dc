"""What a step of a fit in several processes sends, computes and reads; see docs/many_gpus.md.

    python benchmarks/communication.py

Counted: adapter weights, the bytes of the one message of a step, and the floating-point operations
of its forward and backward pass (torch's counter, on the meta device, so large-v3 needs no memory).
Measured here: two processes with gloo on this machine that add up messages of these sizes, and
log-mels of a 30-second window. Derived from these and from published figures of the hardware,
which are in `HARDWARE` with their sources: lower bounds for 8 and for 64 GPUs.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Results, parse, parser, print_table
from contestants import geometry, random_batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from blora_pyro.adapters import Adapters, Group, find_targets
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.processes import Processes

MODELS = ("tiny", "base", "small", "large-v3")
TARGETS = ("q_proj,v_proj", "all-linear")
RANKS = (8, 32)
TOKENS = 30  # decoder positions an utterance
BATCH = 16  # utterances a GPU and step
FLOAT = 4  # bytes
NUMBERS = 5  # loss, NLL, regulariser, tokens, and whether to stop
SIZES_MB = (1, 10, 100, 250)

# Per GPU, as the makers publish it: NVIDIA H200 (data sheet: dense bf16, NVLink 4 one way) and
# ConnectX-7, one 400 Gb/s port a GPU (DGX H200 data sheet).
HARDWARE = {"flops": 989e12, "nvlink": 450e9, "network": 50e9}
REACHED = 0.4  # of the peak, taken for the net's products
SETUPS = {8: "nvlink", 64: "network"}  # GPUs -> what the slowest hop of a ring goes over


def main() -> None:
    """Count, measure, derive."""
    options = parser(__doc__)
    options.add_argument("--worker", type=int, nargs=2, metavar=("BYTES", "ROUNDS"))
    arguments = parse(options)
    if arguments.worker:
        return add_up(*arguments.worker)
    results = Results(arguments, batch=BATCH, tokens=TOKENS, hardware=HARDWARE, reached=REACHED)
    counted = table_of_counts(arguments, results)
    sizes = SIZES_MB[:1] if arguments.quick else SIZES_MB
    sums = {
        size: results.case(f"gloo {size} MB", partial(two_processes, size, 20)) for size in sizes
    }
    print_table(
        ["message, MB", "summed over 2 processes, s", "of it copying, s"],
        [[size, f"{one['seconds']:.3f}", f"{one['copying']:.3f}"] for size, one in sums.items()],
    )
    mel = results.case("log-mel 30 s, 128 bins", log_mel)
    print(f"\nlog-mel of 30 s, one core: {mel['seconds'] * 1e3:.0f} ms, {mel['bytes']:,} bytes")
    results.write(bounds=bounds(counted, mel))
    return None


# ---- counted


def table_of_counts(arguments: argparse.Namespace, results: Results) -> dict[str, dict[str, Any]]:
    """Count for every model, layers and rank."""
    found = {}
    for model in MODELS[:1] if arguments.quick else MODELS:
        for targets in TARGETS:
            for rank in RANKS:
                name = f"{model}, {targets}, rank {rank}"
                found[name] = results.case(name, partial(count, model, targets, rank))
    print_table(
        ["adapter", "weights", "adapter, MB", "message, MB", "TFLOP an utterance"],
        [
            [
                name,
                f"{one['weights']:,}",
                f"{one['adapter_bytes'] / 1e6:.1f}",
                f"{one['message_bytes'] / 1e6:.1f}",
                f"{one['flops'] / 1e12:.2f}",
            ]
            for name, one in found.items()
        ],
    )
    return found


def count(model: str, targets: str, rank: int) -> dict[str, Any]:
    """Return weights, bytes, and operations of a step for one utterance of a 30-second window.

    A message holds the gradients of mean and rho of every weight.
    """
    config = geometry(model)
    config._attn_implementation = "eager"  # looks at no mask, which has no content here
    with torch.device("meta"):
        net = WhisperForConditionalGeneration(config).requires_grad_(False).eval()
        layers: dict[tuple[int, int], list[str]] = {}
        for layer, module in find_targets(net, targets).items():
            layers.setdefault((module.out_features, module.in_features), []).append(layer)
        groups = tuple(Group(tuple(names), *shape, rank) for shape, names in layers.items())
        shapes = {site.name: site.shape for group in groups for site in group.sites}
        factors = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    adapters, batch = Adapters(net, groups, 2.0 * rank), random_batch(config, 1, TOKENS).to("meta")
    with FlopCounterMode(display=False) as counter, adapters.using(factors):
        net(
            input_features=batch.input_features,
            decoder_input_ids=batch.decoder_input_ids,
            decoder_attention_mask=torch.ones_like(batch.decoder_input_ids),  # known, not looked at
            labels=batch.labels,
            use_cache=False,
        ).loss.backward()
    weights = sum(one.numel() for one in factors.values())
    return {
        "weights": weights,
        "adapter_bytes": FLOAT * weights,
        "message_bytes": FLOAT * (2 * weights + NUMBERS),
        "flops": counter.get_total_flops(),
    }


# ---- measured


def two_processes(megabytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of `Processes.sum_over_all`, and of the copies into one message and back alone."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    count = str(megabytes * 10**6)
    command = [sys.executable, __file__, "--worker", count, str(rounds)]
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    common |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [one.communicate()[0] for one in started]
    seconds, copying = map(float, outputs[0].split()[-2:])
    return {"seconds": seconds, "copying": copying, "bytes_a_second": float(count) / seconds}


def add_up(size: int, rounds: int) -> None:
    """In one of two processes: print both medians."""
    together = Processes.join("cpu")
    parts = 8  # tensors, as many as a guide of two shapes has
    tensors = [torch.ones(size // FLOAT // parts) for _ in range(parts)]
    interrupts = Interrupts(active=False)
    seconds, copying = [], []
    for _ in range(rounds + 2):
        together.sum_over_all([torch.ones(1)], [1.0], interrupts)  # both are here
        started = time.perf_counter()
        together.sum_over_all(tensors, [1.0] * (NUMBERS - 1), interrupts)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        flat = torch.cat(tensors)
        for one, total in zip(tensors, flat.chunk(parts), strict=True):
            one.copy_(total)
        copying.append(time.perf_counter() - started)
    together.leave()
    print(statistics.median(seconds[2:]), statistics.median(copying[2:]))


def log_mel() -> dict[str, Any]:
    """Return the seconds of a window's features on one core, and their bytes (float16)."""
    extractor = WhisperFeatureExtractor(feature_size=128)
    audio = np.random.default_rng(0).standard_normal(30 * 16_000).astype(np.float32)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        features = extractor(audio, sampling_rate=16_000, return_tensors="np").input_features
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[2:]), "bytes": 2 * features.size}


# ---- derived


def bounds(counted: dict[str, dict[str, Any]], mel: dict[str, Any]) -> dict[str, Any]:
    """Return lower bounds of a step's products and message, and what must be read meanwhile."""
    found = {}
    for name, one in counted.items():
        for gpus, link in SETUPS.items() if name.startswith(MODELS[-1]) else ():
            products = BATCH * one["flops"] / (HARDWARE["flops"] * REACHED)
            ring = 2 * (gpus - 1) / gpus * one["message_bytes"] / HARDWARE[link]
            rate = gpus * BATCH / (products + ring)
            found[f"{name}, {gpus} GPUs"] = {
                "products_seconds": products,
                "message_seconds": ring,
                "message_share": ring / (products + ring),
                "utterances_a_second": rate,
                "feature_bytes_a_second": rate * mel["bytes"],
                "log_mel_cores": rate * mel["seconds"],
            }
    heads = list(next(iter(found.values()), {}))
    rows = [(name, *(f"{value:.3g}" for value in one.values())) for name, one in found.items()]
    print_table(("adapter", *heads), rows)
    return found


if __name__ == "__main__":
    main()
