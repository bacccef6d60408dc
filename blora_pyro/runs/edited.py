"""Runs made from other runs: one pruned, or several combined. Every command takes their folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.options import AUTO
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.combining import MEAN, PRODUCT, check_alike, combine
from blora_pyro.posterior.pruning import prune
from blora_pyro.runs.folders import read_run, write_run, written_folder
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.record import FINISHED, Combined, Pruned, RunRecord, Size
from blora_pyro.runs.report_page import write_own_report
from blora_pyro.runs.scoring import Scoring, compare
from blora_pyro.runs.shown import ShownRun


def prune_run(
    folder: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    snr: float | None = None,
    sparsity: float | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    device: str = AUTO,
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
        progress: Listener to the stages; None is bars in a notebook.

    Returns:
        The content of the pruned run's `metrics.json`: `size`, and rates where "base" is the full
        adapter and "adapted" the pruned one.

    Raises:
        UserError: If the run can't be read, `out` can't be written, or see `prune`.
    """
    progress = heard_by(progress)
    posterior, record = read_run(folder, device)
    pruned = prune(posterior, rank=rank, snr=snr, sparsity=sparsity)
    how: Pruned = {"from": str(folder), "rank": rank, "snr": snr, "sparsity": sparsity}
    how |= {"full": _size(posterior), "pruned": _size(pruned)}
    size = {"full": how["full"], "pruned": how["pruned"]}
    metrics: dict[str, Any] = {"size": size, "adapter": pruned.fingerprint}
    with written_folder(Path(out), overwrite, folder, record.resolved.base) as target:
        if evaluate:
            scoring = Scoring.of(record.resolved, "test", progress)
            full = scoring.score(posterior, "full adapter")
            fewer = scoring.score(pruned, "pruned adapter")
            metrics |= compare(pruned, full, fewer, record.resolved)
        record = replace(record, pruned=how, kept=None)
        write_run(target, pruned, record, metrics)
        write_own_report(target, ShownRun(str(out), FINISHED, record, pruned, metrics))
    return metrics


def _size(posterior: Posterior) -> Size:
    modules = [(name, group.rank) for group in posterior.groups for name in group.modules]
    return {
        "layers": len(modules),
        "directions": sum(rank for _, rank in modules),
        "adapter_weights": posterior.num_weights,
        "nonzero_weights": sum(int(mean.count_nonzero()) for mean in posterior.mean.values()),
    }


def combine_runs(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = MEAN,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Combined:
    """Write one adapter made from several runs, in a run folder.

    Its test sets are those of the first run; its language is that of the runs, if they have one.

    Args:
        folders: Folders of the runs, or their Hub ids.
        out: Folder for the adapter.
        method: See `combine`.
        weights: See `combine`.
        rank: See `combine`.
        overwrite: Write into a folder that holds something.

    Returns:
        The content of `combined` in `run.json`: `from`, `method`, `weights`, `rank`,
        `adapter_weights`, and `kept_norm`, the share of the Frobenius norm of ΔW that is kept.

    Raises:
        UserError: If a run can't be read, the runs do not match, `out` can't be written, or see
            `combine`.
    """
    names = [str(folder) for folder in folders]
    if Path(out).resolve() in [Path(name).resolve() for name in names]:
        raise UserError(f"output {out} is one of the runs; give another")
    read = [read_run(folder) for folder in folders]
    for (posterior, record), name in zip(read, names, strict=True):
        check_alike(read[0][0], posterior, (names[0], name))
        if method == PRODUCT:
            _check_factor(posterior, record, name)
    posteriors = [posterior for posterior, _ in read]
    combined, kept = combine(posteriors, method, weights=weights, rank=rank)
    languages = {record.language for _, record in read}
    how: Combined = {
        "from": names,
        "method": method,
        "weights": None if weights is None else list(weights),
        "rank": combined.rank,
        "adapter_weights": combined.num_weights,
        "kept_norm": kept,
    }
    language = languages.pop() if len(languages) == 1 else None
    config = replace(read[0][1].resolved, language_map=combined.language_map or AUTO)
    record = RunRecord(FINISHED, config=config, language=language, combined=how)
    bases = {own.resolved.base for _, own in read}
    with written_folder(Path(out), overwrite, *folders, *bases) as target:
        write_run(target, combined, record)
        write_own_report(target, ShownRun(str(out), FINISHED, record, combined))
    return how


def _check_factor(posterior: Posterior, record: RunRecord, name: str) -> None:
    """Refuse a run that can't be a factor of a product."""
    other = "give method mean or weighted"
    if record.made_of:
        how, _ = record.made_of
        raise UserError(f"{name} is a {how} run, without the prior that product needs; {other}")
    if posterior.family.files:
        raise UserError(f"the prior of {name} is code, which is not run here; {other}")
    if not any(value.any() for value in posterior.stddev.values()):
        raise UserError(
            f"{name} is a point estimate, without the spread that product needs; {other}"
        )
