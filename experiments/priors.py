"""Every prior family at its defaults on the pocket Whisper: what is gained, forgotten, left open.

    python experiments/priors.py

One fit for each family, the command line's defaults otherwise; then `prune` at one standard
deviation. Run folders that are there are used as they are, so that it can be stopped. Prints the
table of docs/results.md; results with intervals are in `experiments/priors/priors.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from records import ROOT, origin

from blora_pyro import fit
from blora_pyro.diagnostics import summarise
from blora_pyro.families import FAMILIES
from blora_pyro.files import write_json
from blora_pyro.runs.edited import prune_run
from blora_pyro.runs.folders import read_run
from blora_pyro.tables import Percent


def main() -> None:
    """Fit what is missing, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/priors"), help="folder for fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of a fit (default: the command line's)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    output = ROOT / "experiments" / "priors" / "priors.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    families = {}
    for prior in FAMILIES:
        folder, small = (arguments.runs / f"{prior}{end}" for end in ("", "-pruned"))
        if not (folder / "metrics.json").is_file():
            options = {"prior": prior, "seed": arguments.seed, "steps": arguments.steps}
            fit(output=folder, overwrite=True, **options)
        if not (small / "metrics.json").is_file():
            prune_run(folder, small, snr=1.0, overwrite=True)
        families[prior] = figures(folder, small)
        print(line(prior, families[prior]), flush=True)
    write_json(arguments.output, {**origin(), "families": families})


def figures(folder: Path, small: Path) -> dict[str, Any]:
    """Return the figures of one run and of its pruned adapter."""
    posterior, record = read_run(folder)
    summary = summarise(posterior)
    metrics, pruned = (
        json.loads((where / "metrics.json").read_text(encoding="utf-8"))
        for where in (folder, small)
    )
    new_domain = metrics["new_domain"]
    return {
        "prior_args": record.resolved.prior_args,
        "new_domain": {state: new_domain[state]["wer"] for state in ("base", "adapted", "change")},
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
    """Return a row of the table in docs/results.md."""
    weights = found["pruned"]["pruned"]["adapter_weights"]
    cost = 100 * found["pruned"]["new_domain"]["difference"]
    new, forgetting = found["new_domain"]["adapted"], found["forgetting"]
    cells = (f"`{prior}`", Percent.of(new), Percent.of(forgetting), found["directions"])
    return f"| {' | '.join(map(str, cells))} | {weights:,} | {cost:+.1f} |"


if __name__ == "__main__":
    main()
