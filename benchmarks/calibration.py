"""Does the posterior know better when it is wrong? Word confidences of fits side by side.

    python benchmarks/calibration.py RUN... --output benchmarks/results/calibration.json

RUN is the folder of a fit to one of the pocket domains (those of `blora-pyro compare` lie in its
`fits/`). Words of its test set get the softmax of the mean as their confidence and, where the fit
has a posterior, that of `transcribe --samples`; see `confidence.py`. Figures are pooled over fits
of one kind, with 95% bootstrap intervals over utterances; a difference is that to LoRA's softmax,
of the same resampled utterances.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about
from confidence import CONFIDENCE, MEASURES, RESAMPLES, SOFTMAX, Scored, score, with_interval
from sparsity import kind

from blora_pyro import load_base
from blora_pyro.data import load_split
from blora_pyro.runs.folders import read_run

Place = tuple[str, int]  # domain and seed
LORA = "LoRA"


def main() -> None:
    """Score every fit, print a line a kind, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, kinds = load_base("pocket"), dict[str, dict[Place, Scored]]()
    for folder in arguments.runs:
        config = read_run(folder, "cpu")[1].resolved
        (domain,) = map(str, config.sources)
        found = score(base, folder, domain, "test", arguments.samples)
        kinds.setdefault(kind(config), {})[domain, config.seed] = found
        print(f"{folder}: {kind(config)}, {domain}", flush=True)
    result = {name: rows(found, kinds.get(LORA, {})) for name, found in kinds.items()}
    for name, row in result.items():
        cells = [f"{key} {value}" for key, value in row.items()]
        print(f"{name}: {'; '.join(cells)}")
    if arguments.output:
        write(arguments, result)


def rows(fits: dict[Place, Scored], others: dict[Place, Scored]) -> dict[str, Any]:
    """Every measure of softmax and confidence of a kind of fits, and the difference to LoRA's."""
    right = np.concatenate([one.right for one in fits.values()])
    found: dict[str, Any] = {
        "fits": [f"{domain}, seed {seed}" for domain, seed in fits],
        "words": len(right),
        "accuracy": round(float(right.mean()), 4),
    }
    has_draws = any((one.kinds["agreement"] < 1).any() for one in fits.values())
    for name in (SOFTMAX, CONFIDENCE) if has_draws else (SOFTMAX,):
        mine = resampled(fits, name)
        common = {place: one for place, one in others.items() if place in fits}
        found[name] = {measure: with_interval(values) for measure, values in mine.items()}
        if common.keys() == fits.keys():
            lora = resampled(common, SOFTMAX)
            for measure, values in mine.items():
                difference = with_interval(values - lora[measure])
                found[name][f"{measure}_difference"] = difference
    return found


def resampled(fits: dict[Place, Scored], name: str) -> dict[str, np.ndarray]:
    """Measure -> its value, then those of resamplings of each domain's utterances."""
    rng = np.random.default_rng(0)
    counts = {domain: len(load_split(domain, "test")) for domain, _ in fits}
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    members = {place: words_of(one, counts[place[0]]) for place, one in fits.items()}
    for draw in range(RESAMPLES + 1):
        drawn = {
            domain: np.arange(n) if not draw else np.sort(rng.integers(0, n, n))
            for domain, n in sorted(counts.items())
        }
        shares, right = [], []
        for place, one in fits.items():
            words = np.concatenate([members[place][i] for i in drawn[place[0]]])
            shares.append(one.kinds[name][words])
            right.append(one.right[words])
        for measure, formula in MEASURES.items():
            values[measure].append(formula(np.concatenate(shares), np.concatenate(right)))
    return {measure: np.array(found) for measure, found in values.items()}


def words_of(scored: Scored, count: int) -> list[np.ndarray]:
    """The places of every utterance's words."""
    return [np.flatnonzero(scored.utterances == i) for i in range(count)]


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """JSON."""
    report = {
        **about(arguments.threads),
        "command": f"python {sys.argv[0]} RUN... --samples {arguments.samples}",
        "samples": arguments.samples,
        "kinds": result,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
