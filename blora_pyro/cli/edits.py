"""Adapters and checkpoints made of fits: `prune`, `combine`, `merge`."""

from pathlib import Path
from typing import Annotated

import typer

from blora_pyro.cli.common import (
    Device,
    Domain,
    Dtype,
    Json,
    Overwrite,
    RunFolder,
    Strength,
    StrengthBy,
    numbers,
    one_line_errors,
    print_json,
)


def prune(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the smaller run.")],
    snr: Annotated[
        float | None,
        typer.Option(help="Keep directions of ΔW above this many posterior standard deviations."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Keep this many directions of ΔW in every layer.")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Set this share of A and B to zero: what changes ΔW least."),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure what it costs.")
    ] = True,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write a smaller or sparser adapter; show what that costs."""
    with one_line_errors():
        from blora_pyro.reports.progress import TerminalProgress
        from blora_pyro.runs.pruned import prune_run
        from blora_pyro.runs.report import prune_tables
        from blora_pyro.tables import print_report

        with TerminalProgress() as progress:
            metrics = prune_run(
                run,
                out,
                rank=rank,
                snr=snr,
                sparsity=sparsity,
                evaluate=evaluation,
                overwrite=overwrite,
                device=device,
                progress=progress,
            )
        if as_json:
            print_json(metrics)
        else:
            print_report([*prune_tables(metrics), f"run folder: {out}"])


def combine(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders or Hub ids of two fits or more.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="mean|weighted|product",
            help="Of ΔW: mean; weighted, by --weights; product of the posteriors, every element as "
            "heavy as its run is sure of it, the prior counted once.",
        ),
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...", help="Of the runs' ΔW, taken as they are.", show_default="none"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Keep this many directions of ΔW in every layer.",
            show_default="all; product: the runs' largest rank",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one adapter of several that were fitted separately, on one base and the same layers."""
    with one_line_errors():
        from blora_pyro.runs.combined import combine_runs

        found = combine_runs(
            folders,
            output,
            method=method,
            weights=None if weights is None else numbers("weights", weights),
            rank=rank,
            overwrite=overwrite,
        )
        if as_json:
            print_json(found)
        else:
            from blora_pyro.runs.report import combine_line
            from blora_pyro.tables import print_report

            print_report([combine_line(found), f"run folder: {output}"])


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.")],
    dtype: Dtype = "float32",
    strength: Strength = 1.0,
    strength_by: StrengthBy = "scale",
    domain: Domain = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the base with the posterior mean merged in: a plain Whisper checkpoint."""
    with one_line_errors():
        from blora_pyro.runs import finished

        finished.merge_run(
            run,
            out,
            overwrite,
            dtype,
            strength=strength,
            strength_by=strength_by,
            domain=domain,
        )
        typer.echo(f"merged checkpoint: {out}")
