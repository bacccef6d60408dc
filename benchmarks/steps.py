"""Time of a step (forward, backward, optimiser) of ours and of its peers, against PEFT LoRA.

    python benchmarks/steps.py

Random weights in the shapes of whisper-tiny, -base and -small; one window of 30 s with 30 tokens,
the least that hides what a step costs whatever its batch. A ratio is that of two steps of one
round. bf16 is autocast, which a processor without such instructions emulates slowly. On base and
small the contestants are ours and PEFT LoRA. `--base` takes a checkpoint in place of random
weights, `--device cuda` a card, where the peak of memory that a step allocates is told, too.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Results, parse, parser, print_table, race, shown
from contestants import CONTESTANTS, PEER, Contestant, geometry, random_batch, random_net
from transformers import WhisperForConditionalGeneration

ROUNDS = {"tiny": 16, "base": 24, "small": 12}
ALL_ON = "tiny"  # on the others ours and its peer alone, with more rounds in the same time
RANKS = (8, 32)
TARGETS = ("q_proj,v_proj", "all-linear")
QUICK = [("tiny", "fp32", "all-linear", 8)]


def main() -> None:
    """Measure case by case, print a table, write JSON."""
    found = parser(__doc__)
    found.add_argument("--geometries", default=",".join(ROUNDS))
    found.add_argument("--precisions", default="fp32,bf16")
    found.add_argument("--contestants", default=";".join(CONTESTANTS), help="PEFT LoRA first")
    found.add_argument("--rounds", type=int, help="in place of those that each geometry has")
    found.add_argument("--base", help="folder of a checkpoint, in place of the geometries")
    found.add_argument("--device", default="cpu")
    found.add_argument("--batch-size", type=int, default=1)
    arguments = parse(found)
    names = arguments.contestants.split(";")
    about = {"contestants": names, "rounds": arguments.rounds or ROUNDS}
    if arguments.base:
        about |= {"device": arguments.device, "batch_size": arguments.batch_size}
    results = Results(arguments, **about)
    sizes, precisions = arguments.geometries.split(","), arguments.precisions.split(",")
    sizes = [arguments.base] if arguments.base else sizes
    cases = QUICK if arguments.quick else [*product(sizes, precisions, TARGETS, RANKS)]
    for size, precision, targets, rank in cases:
        rounds = 2 if arguments.quick else arguments.rounds or ROUNDS.get(size, ROUNDS["small"])
        name = f"{Path(size).name}, {precision}, {targets}, rank {rank}"
        those = names if size == ALL_ON else [one for one in names if one in (PEER, "ours")]
        where = arguments.device, arguments.batch_size
        case = results.case(
            name, partial(measure, those, size, precision == "bf16", targets, rank, rounds, *where)
        )
        ratios = [f"{one} {shown(found['ratio'])}" for one, found in case.items() if one != PEER]
        print("; ".join([f"{name}: {PEER} {shown(case[PEER]['seconds'])} s", *ratios]), flush=True)
    summary = summarise(results.cases)
    results.write(summary=summary)
    rows = [
        (name, f"{one['geometric_mean']:.2f}", f"{one['worst']:.2f}", one["worst_case"])
        for name, one in summary.items()
    ]
    print_table((f"time of a step, {PEER} = 1", "geometric mean", "worst", "where"), rows)


def measure(
    names: list[str],
    size: str,
    bf16: bool,
    targets: str,
    rank: int,
    rounds: int,
    device: str,
    batch_size: int,
) -> dict[str, Any]:
    """Return seconds and ratios of every contestant in one case, on a card their memory, too."""
    if size in ROUNDS:
        net = random_net(geometry(size))
    else:
        load = WhisperForConditionalGeneration.from_pretrained
        net = load(size, local_files_only=True, dtype=torch.float32)
        net.requires_grad_(False).eval()
    net.to(device)
    batch = random_batch(net.config, batch_size).to(device)
    torch.manual_seed(1)
    those = {name: CONTESTANTS[name](net, rank, targets, bf16) for name in names}
    steps = {name: partial(one.step, batch) for name, one in those.items()}
    peaks: dict[str, int] = {}
    inside = lambda name: watched(name, those[name], peaks)  # noqa: E731
    found = race(steps, PEER, rounds, warm_up=1, inside=inside)
    return {name: one | {"bytes": peaks[name]} if peaks else one for name, one in found.items()}


@contextmanager
def watched(name: str, contestant: Contestant, peaks: dict[str, int]) -> Iterator[None]:
    """Keep, on a card, the most memory that a step has allocated beyond what was there before."""
    on_card = contestant.net.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_card else 0
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    with contestant.store_in_place():
        yield
    if on_card:
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated() - before)


def summarise(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the geometric mean over cases, and the worst, of every contestant's median ratio."""
    found = {}
    for name in dict.fromkeys(name for case in cases.values() for name in case):
        ratios = {case: one[name]["ratio"]["median"] for case, one in cases.items() if name in one}
        worst = max(ratios, key=lambda case: ratios[case])
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        found[name] = {"geometric_mean": mean, "worst": ratios[worst], "worst_case": worst}
        found[name]["cases"] = len(ratios)
    return found


if __name__ == "__main__":
    main()
