"""Commands that make another folder, or a repository, of runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import (
    Device,
    Domain,
    Json,
    Overwrite,
    RunFolder,
    Strength,
    StrengthBy,
    echo,
    one_line_errors,
    print_result,
    quiet_libraries,
)
from blora_pyro.cli.parameters import with_options, with_verbosity
from blora_pyro.declarations import numbers
from blora_pyro.errors import UserError
from blora_pyro.options import AUTO, KEEP_OPTIONS, FitConfig


@with_verbosity
@with_options(FitConfig, only=KEEP_OPTIONS)
def keep(
    given: dict[str, Any],
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="A run, or any PEFT LoRA of a Whisper: folder or Hub id."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the adapter at the strength that is found.", show_default="none"
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show how much an adapter has forgotten, and turn it down until it keeps a contract.

    What is not given is that of the fit, where the adapter is a run.
    """
    with one_line_errors():
        if (contract := given.pop("keep", None)) is None:
            raise UserError("keep is not given; give the points that may be lost, as --keep 1")
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.runs.keeping import keep_adapter
        from blora_pyro.runs.report import fit_tables, kept_line, strength_tables

        with TerminalProgress() as progress:
            found = keep_adapter(
                adapter, contract, output, overwrite=overwrite, progress=progress, **given
            )
        kept, written = found["kept"], [f"adapter: {output}"] if output else []
        print_result(
            found,
            as_json,
            lambda: [
                *strength_tables(kept["curve"]),
                *fit_tables(found["metrics"]),
                kept_line(kept),
                *written,
            ],
        )


@with_verbosity
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
        typer.Option(help="Set this share of A and B to zero: the weights that change ΔW least."),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure the errors of both adapters.")
    ] = True,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Write a smaller or sparser adapter; show what that costs."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.runs.edited import prune_run
        from blora_pyro.runs.report import prune_tables

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
        print_result(metrics, as_json, lambda: [*prune_tables(metrics), f"run folder: {out}"])


def combine(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders or Hub ids of two fits or more.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="mean|weighted|product",
            help="mean of the updates ΔW; their sum weighted by --weights; or product of the "
            "posteriors: every element is weighted by its precision, the prior counted once.",
        ),
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...", help="Weights of the runs' ΔW; not normalised.", show_default="none"
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
    """Combine the adapters of several fits, of one base and the same layers, into one."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.runs.edited import combine_runs
        from blora_pyro.runs.report import combine_line

        found = combine_runs(
            folders,
            output,
            method=method,
            weights=None if weights is None else numbers("weights", weights),
            rank=rank,
            overwrite=overwrite,
        )
        print_result(found, as_json, lambda: [combine_line(found), f"run folder: {output}"])


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Data type of the checkpoint: float32, bfloat16 or float16."
        ),
    ] = "float32",
    strength: Strength = None,
    strength_by: StrengthBy = "scale",
    domain: Domain = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the base with the posterior mean merged in: a plain Whisper checkpoint."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.runs import finished

        finished.merge_run(
            run,
            out,
            overwrite,
            dtype,
            strength=strength,
            strength_by=strength_by,
            domain=domain,
            on_note=lambda note: echo(f"note: {note}", err=True),
        )
        echo(f"merged checkpoint: {out}")


def push_to_hub(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a fit.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME; created if it does not exist.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch to write to.", show_default="the main one"),
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option(help="Message of the commit.", show_default="a plain one")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="The base's id on the Hub, if the fit had it in a local folder.",
            show_default="the fit's",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="License of the adapter, for its card: apache-2.0, ...",
            show_default="none",
        ),
    ] = None,
    with_report: Annotated[
        bool,
        typer.Option(
            "--with-report",
            help="Upload the report, too: with transcripts of the test sets, without audio.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Write what would be uploaded to this folder, and upload nothing."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Upload a run to the Hugging Face Hub: PEFT adapter, posterior and model card.

    The token is that of `hf auth login`, or HF_TOKEN. Of local paths only the last part is shown.
    """
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.publishing.uploads import push_run, write_public_run
        from blora_pyro.runs.folders import read_run, written_folder

        card: dict[str, Any] = {"revision": revision, "base": base, "license": license}
        card["with_report"] = with_report
        if output is not None:
            own_base = read_run(run, pooled=True)[1].resolved.base
            with written_folder(output, overwrite, run, own_base) as folder:
                write_public_run(run, folder, repo_id, **card)
            echo(f"not uploaded, but written to: {output}")
            return
        url = push_run(
            run,
            repo_id,
            private=private or None,
            commit_message=commit_message,
            create_pr=create_pr,
            **card,
        )
        echo(f"pushed: {url}")
