"""Runs read, combined and written as one; see `combining`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.files import write_json
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.combining import MEAN, PRODUCT, check_alike, combine
from blora_pyro.runs.folders import FINISHED, RUN, claim, read_run


def combine_runs(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = MEAN,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one adapter of several runs: a folder as `prune` writes one, for all commands.

    Its test sets are those of the first run; its language is that of the runs, or, where they have
    several, to be given or detected.

    Args:
        folders: Of the runs.
        out: Folder for the adapter.
        method: See `combine`.
        weights: See `combine`.
        rank: See `combine`.
        overwrite: Write into a folder that holds something.

    Returns:
        What `run.json` holds as `combined`: `from`, `method`, `weights`, `rank`, `adapter_weights`,
        and `kept_norm`, the share of the Frobenius norm of ΔW that is kept.

    Raises:
        UserError: If a run can't be read, the runs do not match, `out` can't be written, or see
            `combine`.
    """
    names = [str(folder) for folder in folders]
    if Path(out).resolve() in [Path(name).resolve() for name in names]:
        raise UserError(f"output {out} is one of the runs; give another")
    read = [read_run(folder) for folder in folders]
    for (posterior, about), name in zip(read, names, strict=True):
        check_alike(read[0][0], posterior, (names[0], name))
        if method == PRODUCT:
            _check_factor(posterior, about, name)
    posteriors = [posterior for posterior, _ in read]
    combined, kept = combine(posteriors, method, weights=weights, rank=rank)
    about = read[0][1]
    languages = {one["language"] for _, one in read}
    how = {
        "from": names,
        "method": method,
        "weights": None if weights is None else list(weights),
        "rank": combined.rank,
        "adapter_weights": combined.num_weights,
        "kept_norm": kept,
    }
    target = claim(Path(out), overwrite)
    combined.save(target)
    content = {
        "state": FINISHED,
        "config": about["config"].to_json(),
        "language": languages.pop() if len(languages) == 1 else None,
        "combined": how,
    }
    write_json(target / RUN, content)
    return how


def _check_factor(posterior: Posterior, about: Mapping[str, Any], name: str) -> None:
    """Refuse a run that can't be a factor of a product."""
    other = "give method mean or weighted"
    if "pruned" in about or "combined" in about:
        how = "pruned" if "pruned" in about else "combined"
        raise UserError(f"{name} is a {how} run, without the prior that product needs; {other}")
    if posterior.family.files:
        raise UserError(f"the prior of {name} is code, which is not run here; {other}")
    if not any(value.any() for value in posterior.stddev.values()):
        raise UserError(
            f"{name} is a point estimate, without the spread that product needs; {other}"
        )
