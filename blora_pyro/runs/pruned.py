"""A run with a smaller adapter, and what that costs; see `prune`."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blora_pyro.files import write_json
from blora_pyro.hub import find_run
from blora_pyro.models import base_of
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.runs.folders import claim, read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.outcomes import compare, evaluation_sets, measure


def prune_run(
    folder: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    snr: float | None = None,
    sparsity: float | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Write a run with a smaller adapter, and measure what that costs on the run's test sets.

    Args:
        folder: A run folder.
        out: Folder for the pruned run.
        rank: See `prune`.
        snr: See `prune`.
        sparsity: See `prune`.
        evaluate: Measure error with the full and with the pruned adapter.
        overwrite: Write into a folder that holds something.
        device: A torch device.
        progress: Told of stages.

    Returns:
        What `metrics.json` of the pruned run holds: `size`, and rates where "base" is the full
        adapter and "adapted" the pruned one.

    Raises:
        UserError: If the run can't be read, `out` can't be written, or see `prune`.
    """
    progress = progress or Listener()
    posterior, about = read_run(folder, device)
    pruned = prune(posterior, rank=rank, snr=snr, sparsity=sparsity)
    target = claim(Path(out), overwrite)
    size = {"full": _size(posterior), "pruned": _size(pruned)}
    metrics: dict[str, Any] = {"size": size}
    if evaluate:
        config = about["config"]
        base = base_of(config)
        sets = evaluation_sets(base, config)
        scored = partial(measure, base, sets, normalizer=config.normalizer)
        with posterior.applied(base.net):
            full = scored(lambda name: progress.stage(f"full adapter on {name}"))
        with pruned.applied(base.net):
            fewer = scored(lambda name: progress.stage(f"pruned adapter on {name}"))
        metrics |= compare(pruned, full, fewer, config)
    pruned.save(target)
    write_json(target / "metrics.json", metrics)
    by = {"rank": rank, "snr": snr, "sparsity": sparsity}
    _write_about(find_run(folder), target, {"from": str(folder), **by, **size})
    return metrics


def _size(posterior: Posterior) -> Mapping[str, int]:
    modules = [(name, group.rank) for group in posterior.groups for name in group.modules]
    return {
        "layers": len(modules),
        "directions": sum(rank for _, rank in modules),
        "adapter_weights": posterior.num_weights,
        "nonzero_weights": sum(int(mean.count_nonzero()) for mean in posterior.mean.values()),
    }


def _write_about(folder: Path, target: Path, pruned: dict[str, Any]) -> None:
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(target / "run.json", about | {"pruned": pruned})
