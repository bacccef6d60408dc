"""What pruning costs, over domains and seeds: pruned fits against the same fits whole.

    python experiments/pruning_cost.py

Reads the table of a study and fits nothing. Differences of new-domain and backward error in points,
with 95% paired-bootstrap intervals over utterances, of every pruned candidate whose fits were also
scored whole.
"""

import argparse
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from records import ROOT

from blora_pyro.metrics.bootstrap import FloatArray, paired_rates, percentile_interval
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.results import TEST, ScoredFit, read_results
from blora_pyro.tables import Percent

Pairs = Mapping[tuple[str, int], tuple[ScoredFit, ScoredFit]]  # data and seed -> whole, pruned


def main() -> None:
    """Print a line for each candidate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    table = ROOT / "experiments" / "pocket" / "results.csv"
    parser.add_argument("--results", type=Path, default=table, help="CSV of a study")
    parser.add_argument("--setting", default="150x200")
    arguments = parser.parse_args()
    rows = [row for row in read_results(arguments.results) if row.split == TEST]
    rows = [row for row in rows if row.setting == arguments.setting]
    whole = {(row.command, row.data, row.seed): row for row in rows if not row.after}
    pruned: dict[str, dict[tuple[str, int], tuple[ScoredFit, ScoredFit]]] = {}
    for row in rows:
        other = whole.get((row.command, row.data, row.seed))
        if row.after.startswith("sparsity") and other is not None:
            pruned.setdefault(row.candidate, {})[row.data, row.seed] = other, row
    for candidate, pairs in pruned.items():
        cells = [f"{name} {cost}" for name, cost in costs(pairs).items()]
        print(f"{candidate}: {len(pairs)} fits, {', '.join(cells)}")


def costs(pairs: Pairs) -> dict[str, Percent]:
    """Return the rise of each error, averaged over seeds, then over data sets."""
    found: dict[str, dict[str, list[FloatArray]]] = {NEW_DOMAIN: {}, "backward": {}}
    for (data, _), pair in pairs.items():
        rises = {name: rise(data, name, *pair) for name in pair[0].counts}
        found[NEW_DOMAIN].setdefault(data, []).append(rises.pop(NEW_DOMAIN))
        backward = np.mean([*rises.values()], axis=0)
        found["backward"].setdefault(data, []).append(backward)
    curves = {
        name: np.mean([np.mean(own, axis=0) for own in by_data.values()], axis=0)
        for name, by_data in found.items()
    }
    return {
        name: Percent(float(curve[0]), percentile_interval(curve[1:]), signed=True)
        for name, curve in curves.items()
    }


def rise(data: str, name: str, whole: ScoredFit, pruned: ScoredFit) -> FloatArray:
    """Return the difference of a set's error, observed and resampled, alike for all fits."""
    seed = zlib.crc32(f"{name} {data if name == NEW_DOMAIN else ''}".encode())
    before, after = paired_rates([whole.main(name), pruned.main(name)], seed=seed)
    return after - before


if __name__ == "__main__":
    main()
