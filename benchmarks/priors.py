"""Every prior family at its defaults on the pocket Whisper: what is gained, forgotten, left open.

    python benchmarks/priors.py --runs runs/priors --output benchmarks/results/priors.json

One fit a family and seed, the command line's defaults otherwise; then `prune` at one standard
deviation. Run folders that are there already are used as they are, so that it can be stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import about

from blora_pyro import fit
from blora_pyro.diagnostics import summarise
from blora_pyro.families import FAMILIES
from blora_pyro.runs.edited import prune_run
from blora_pyro.runs.folders import read_run


def main() -> None:
    """Fit what is missing, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/priors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    families = {}
    for prior in FAMILIES:
        folder = arguments.runs / prior
        if not (folder / "metrics.json").is_file():
            fit(output=folder, prior=prior, seed=arguments.seed, overwrite=True)
        small = arguments.runs / f"{prior}-pruned"
        if not (small / "metrics.json").is_file():
            prune_run(folder, small, snr=1.0, overwrite=True)
        families[prior] = row(folder, small)
        print(line(prior, families[prior]), flush=True)
    if arguments.output:
        report = {**about(arguments.threads), "families": families}
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


def row(folder: Path, small: Path) -> dict[str, Any]:
    """The figures of one run and of its pruned adapter."""
    posterior, record = read_run(folder)
    summary = summarise(posterior)
    metrics, pruned = (
        json.loads((where / "metrics.json").read_text(encoding="utf-8"))
        for where in (folder, small)
    )
    return {
        "prior_args": record.resolved.prior_args,
        "new_domain": {
            state: metrics["new_domain"][state]["wer"] for state in ("base", "adapted", "change")
        },
        "forgetting": metrics["backward_error"]["change"],
        "near_zero": metrics["sparsity"],
        "directions": sum(update.directions for update in summary.updates),
        "kl": summary.kl,
        "pruned": {
            **pruned["size"],
            "new_domain": pruned["new_domain"]["change"]["wer"],
            "forgetting": pruned["backward_error"]["change"],
        },
    }


def line(prior: str, found: dict[str, Any]) -> str:
    """A row of the README's table."""
    new, forgetting = found["new_domain"]["adapted"], found["forgetting"]
    low, high = new["interval"]
    down, up = forgetting["interval"]
    weights = found["pruned"]["pruned"]["adapter_weights"]
    cost = 100 * found["pruned"]["new_domain"]["difference"]
    return (
        f"| `{prior}` | {100 * new['rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}] "
        f"| {100 * forgetting['difference']:+.1f} [{100 * down:.1f}, {100 * up:.1f}] "
        f"| {found['directions']} | {weights:,} | {cost:+.1f} |"
    )


if __name__ == "__main__":
    main()
