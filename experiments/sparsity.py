"""What sparsity costs: fits whose least elements of A and B are set to zero, scored.

    python experiments/sparsity.py RUN...   # score these fits; nothing for the figure alone

RUN is the folder of a fit (those of a study are in its output). A share of the elements of A and B
is set to zero at the posterior mean, those without which ΔW changes least (`prune`); then the test
sets are scored. A row a fit and share goes to `experiments/pocket/sparsity.csv`, and from that the
figure is drawn: fits of one kind (method, distillation) averaged over domains and seeds. A fit that
is in the table is not scored again.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from records import ROOT, origin

from blora_pyro import prune
from blora_pyro.options import FitConfig
from blora_pyro.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, SMALL, label_axes, new_figure
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.scoring import NEW_DOMAIN, Scoring

TABLE = ROOT / "experiments" / "pocket" / "sparsity.csv"
SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.997)
COLORS = (BLUE, ORANGE, GREEN, GREY, BLACK)

Row = dict[str, Any]


def main() -> None:
    """Score the fits that are not in the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of fits")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=TABLE, help="CSV, and name of the figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = read_table(arguments.output)
    for folder in arguments.runs:
        if all((row["run"], row["split"]) != (folder.name, arguments.split) for row in rows):
            rows += score(folder, arguments.shares, arguments.split)
            write_table(arguments.output, rows)
    shown = [row for row in rows if row["split"] == arguments.split]
    plot(shown).savefig(arguments.output.with_suffix(".png"), dpi=110)


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table; [] if there is none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[Row]) -> None:
    """Write the table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def kind_of(config: FitConfig) -> str:
    """Return what a fit is a case of: `BLoRA, normal, distilled`."""
    name = "LoRA" if config.guide == "point" and not config.beta else f"BLoRA, {config.prior}"
    return f"{name}, distilled" if config.distillation else name


def score(folder: Path, shares: list[float], split: str) -> list[Row]:
    """Return a row for each share: the sparsity, and the errors."""
    posterior, record = read_run(folder)
    config = record.resolved
    scoring = Scoring.of(config, split, Listener())
    found = []
    for share in shares:
        sparse = prune(posterior, sparsity=share)
        results = scoring.score(sparse)
        errors = {name: one.main.rate for name, one in results.items()}
        new_domain = errors.pop(NEW_DOMAIN)
        row: Row = {"run": folder.name, "kind": kind_of(config), "data": " ".join(config.domains)}
        row |= {name: getattr(config, name) for name in ("seed", "beta", "lr")}
        row |= {"split": split, "zeroed": share}
        row |= {name: f"{one:.4f}" for name, one in sparse.sparsity().items()}
        row |= {"new_domain": f"{new_domain:.4f}"}
        row |= {"backward": f"{np.mean([*errors.values()]):.4f}", **origin()}
        print(row, flush=True)
        found.append(row)
    return found


def plot(rows: list[Row]) -> Figure:
    """Return errors against the share of elements of A and B that are zero, a line a kind."""
    figure, axes = new_figure("What sparsity costs", 3.6, 1, 2)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    shares = sorted({float(row["zeroed"]) for row in rows})
    errors = {"new_domain": "new-domain error, %", "backward": "backward error, %"}
    for panel, (error, label) in zip(axes[0], errors.items(), strict=True):
        for kind, color in zip(kinds, COLORS, strict=False):
            own = [(float(row["zeroed"]), row[error]) for row in rows if row["kind"] == kind]
            means = [
                100 * np.mean([float(value) for share, value in own if share == wanted] or np.nan)
                for wanted in shares
            ]
            panel.plot(range(len(shares)), means, color=color, marker="o", markersize=4, label=kind)
        label_axes(panel, label, "elements of A and B set to zero, %")
        panel.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, **place)
    return figure


if __name__ == "__main__":
    main()
