"""What sparsity costs: fits whose least elements of A and B are set to zero, scored.

    python benchmarks/sparsity.py RUN... --output benchmarks/results/sparsity.json

RUN is the folder of a fit (those of `blora-pyro compare` lie in its `fits/`). Of every fit a share
of the elements of A and B is set to zero at the posterior mean, those without which ΔW changes
least (`prune`); then the test sets of its new domain and of what the base knew are scored. Beside
the JSON goes a figure: fits of one kind (method, distillation) averaged over domains and seeds.
Stopped, the same command goes on with the fits that are not in the JSON yet.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about
from matplotlib.figure import Figure

from blora_pyro import prune
from blora_pyro.options import FitConfig
from blora_pyro.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, SMALL, label_axes, new_figure
from blora_pyro.runs.finished import Scoring
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.outcomes import NEW_DOMAIN

SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.997)
DIGITS = 4
COLORS = (BLUE, ORANGE, GREEN, GREY, BLACK)


def main() -> None:
    """Score every fit at every share, print a line each, write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: list[dict[str, Any]] = []
    if arguments.output and arguments.output.is_file():
        report = json.loads(arguments.output.read_text(encoding="utf-8"))
        if report["command"] != command(arguments):
            parser.error(f"{arguments.output} is of: {report['command']}; give another --output")
        found = report["rows"]
    scored = {row["run"] for row in found}
    for folder in arguments.runs:
        if folder.name not in scored:
            found += score(folder, arguments.shares, arguments.split)
            if arguments.output:
                write(arguments, found)


def kind(config: FitConfig) -> str:
    """What a fit is a case of."""
    name = "LoRA" if config.guide == "point" and not config.beta else f"BLoRA, {config.prior}"
    return f"{name}, distilled" if config.distillation else name


def score(folder: Path, shares: list[float], split: str) -> list[dict[str, Any]]:
    """A row a share: what was small already, and the errors."""
    posterior, record = read_run(folder, "cpu")
    config = record.resolved
    scoring = Scoring.of(config, split, Listener())
    found = []
    for share in shares:
        sparse = prune(posterior, sparsity=share)
        results = scoring.score(sparse)
        errors = {name: one.main.rate for name, one in results.items()}
        new_domain = errors.pop(NEW_DOMAIN)
        row = {
            "run": folder.name,
            "kind": kind(config),
            "data": str(config.data[0] if isinstance(config.data, tuple | list) else config.data),
            "seed": config.seed,
            "beta": config.beta,
            "lr": config.lr,
            "zeroed": share,
            "sparsity": {name: round(one, DIGITS) for name, one in sparse.sparsity().items()},
            "new_domain": round(new_domain, DIGITS),
            "backward": round(float(np.mean([*errors.values()])), DIGITS),
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)
        found.append(row)
    return found


def command(arguments: argparse.Namespace) -> str:
    """What rows of one report share."""
    shares = " ".join(f"{share:g}" for share in arguments.shares)
    return f"python {sys.argv[0]} RUN... --split {arguments.split} --shares {shares}"


def write(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """JSON, and the figure beside it."""
    report = {
        **about(arguments.threads),
        "command": command(arguments),
        "rows": found,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    plot(found).savefig(arguments.output.with_suffix(".png"), dpi=110)


def plot(found: list[dict[str, Any]]) -> Figure:
    """Errors against the share of elements of A and B that are zero, a line a kind."""
    figure, axes = new_figure("What sparsity costs", 3.6, 1, 2)
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    shares = sorted({row["zeroed"] for row in found})
    errors = {"new_domain": "new-domain error, %", "backward": "backward error, %"}
    for panel, (error, label) in zip(axes[0], errors.items(), strict=True):
        for name, color in zip(kinds, COLORS, strict=False):
            rows = [row for row in found if row["kind"] == name]
            means = [
                100 * np.mean([row[error] for row in rows if row["zeroed"] == share] or np.nan)
                for share in shares
            ]
            panel.plot(range(len(shares)), means, color=color, marker="o", markersize=4, label=name)
        label_axes(panel, label, "elements of A and B set to zero, %")
        panel.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, **place)
    return figure


if __name__ == "__main__":
    main()
