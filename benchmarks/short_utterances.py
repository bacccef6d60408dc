"""Short utterances in long windows: what `--cache-encoder` and `--trim-audio` save of a step.

    python benchmarks/short_utterances.py

A step of ours, its batch made each time, on random weights in the shape of whisper-tiny and noise
of 3 to 5 s in windows of 30 s; `cached` is a step of every pass over the data but the first. What
trimming costs in error is measured by `experiments/trimmed_audio.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Results, parse, parser, print_table, race, shown
from contestants import Ours, geometry, random_batch, random_net

from blora_pyro.data import Batch, trim
from blora_pyro.fitting.encoder_cache import EncoderCache

RANK, BATCH_SIZE, ROUNDS, SECONDS = 8, 4, 10, (3, 5)
TARGETS = {
    "all-linear": "all-linear",
    "last layer of the encoder, decoder": r".*(encoder\.layers\.3|decoder)\..*",
    "decoder": r".*decoder\..*",
}
FULL, TRIMMED, CACHED = "full windows", "trimmed", "cached"


def main() -> None:
    """Print the seconds of a step, by the layers that are adapted."""
    arguments = parse(parser(__doc__))
    results = Results(arguments, rank=RANK, batch_size=BATCH_SIZE, rounds=ROUNDS)
    rows = []
    for name, targets in list(TARGETS.items())[-1 if arguments.quick else 0 :]:
        case = results.case(name, partial(steps, targets, 2 if arguments.quick else ROUNDS))
        ratios = [shown(case[one]["ratio"]) if one in case else "" for one in (CACHED, TRIMMED)]
        rows.append((name, shown(case[FULL]["seconds"]), *ratios))
    print_table(("adapted", f"{FULL}, s", f"{CACHED} / that", f"{TRIMMED} / that"), rows)


def steps(targets: str, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios, with the making of the batch."""
    net = random_net(geometry("tiny"))
    batch = random_batch(net.config, BATCH_SIZE)
    features = batch.input_features.half()
    for row, length in enumerate(torch.linspace(*SECONDS, BATCH_SIZE).tolist()):
        features[row, :, round(100 * length) :] = features.min()
    batches: dict[str, Callable[[], Batch]] = {
        FULL: lambda: replace(batch, input_features=features.float()),
        TRIMMED: lambda: replace(batch, input_features=trim(features).float()),
    }
    torch.manual_seed(1)
    those = {name: Ours(net, RANK, targets, False) for name in (*batches, CACHED)}
    if those[CACHED].model.likelihood.first_adapted:
        cache = EncoderCache(those[CACHED].model, BATCH_SIZE)
        batches[CACHED] = lambda: cache(batches[FULL](), range(BATCH_SIZE), 0)
    calls = {name: lambda n=name: those[n].step(batches[n]()) for name in batches}
    inside = lambda name: those[name].store_in_place()  # noqa: E731
    return race(calls, FULL, rounds, warm_up=1, inside=inside)


if __name__ == "__main__":
    main()
