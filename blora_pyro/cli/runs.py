"""Commands on finished runs, and `priors`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import (
    STRENGTH_HELP,
    Column,
    Device,
    Domain,
    Json,
    Overwrite,
    RunFolder,
    Strength,
    StrengthBy,
    echo,
    help_of,
    one_line_errors,
    print_result,
    quiet_libraries,
)
from blora_pyro.declarations import metavar_of, numbers
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Data set to score.", show_default="the fit's test sets")
    ] = None,
    column: Column = None,
    normalizer: Annotated[
        str | None,
        typer.Option(
            metavar=metavar_of(FitConfig, "normalizer"),
            help=help_of("normalizer"),
            show_default="the fit's",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL file for the results of every utterance."),
    ] = None,
    strength: Annotated[
        str,
        typer.Option(
            metavar="S|S,S,...|START:STOP:STEP",
            help=f"{STRENGTH_HELP}. Several, such as 0:1:0.1, give a curve.",
        ),
    ] = "1",
    strength_by: StrengthBy = "scale",
    split: Annotated[
        str, typer.Option(metavar="test|dev", help="Split of the sets; dev to choose strengths by.")
    ] = "test",
    domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Score the adapter of this domain, after a fit with --pooling hierarchical or "
            "none.",
            show_default="each domain's on its own set, the shared one on the others",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plot of a curve: png, pdf or svg.",
            show_default="RUN/strength.png",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score a run, base and adapted, on its own sets or on another; or at several strengths."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.posterior.strength import parse_strengths
        from blora_pyro.runs import finished
        from blora_pyro.runs.report import fit_tables

        strengths = parse_strengths(strength)
        if len(strengths) > 1:
            if data is not None or output is not None or domain is not None:
                raise UserError(
                    "--data, --domain and --output are for a single strength; leave them out"
                )
            _draw_curve(
                run,
                strengths,
                as_json,
                device=device,
                by=strength_by,
                split=split,
                normalizer=normalizer,
                plot=plot,
                overwrite=overwrite,
            )
            return
        if plot is not None:
            raise UserError(f"plot is {plot}, but there is one strength; give several, as 0:1:0.1")
        with TerminalProgress() as progress:
            metrics = finished.evaluate_run(
                run,
                data,
                progress,
                device,
                normalizer=normalizer,
                output=output,
                overwrite=overwrite,
                split=split,
                strength=strengths[0],
                strength_by=strength_by,
                domain=domain,
                column=column,
            )
        more = [f"utterances: {output}"] if output else []
        print_result(metrics, as_json, lambda: [*fit_tables(metrics), *more])


def _draw_curve(run: Path, strengths: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Score a run at several strengths."""
    from blora_pyro.cli.progress import TerminalProgress
    from blora_pyro.runs.report import strength_tables
    from blora_pyro.runs.strength_curves import strength_curve

    with TerminalProgress() as progress:
        curve = strength_curve(run, strengths, progress, **options)
    print_result(curve, as_json, lambda: strength_tables(curve))


def errors(
    results: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a fit, or a file of evaluate --output."),
    ],
    top: Annotated[int, typer.Option(help="Number of utterances.")] = 10,
    test_set: Annotated[
        str | None,
        typer.Option("--set", help="Test set: new_domain or a backward set.", show_default="all"),
    ] = None,
    state: Annotated[
        str, typer.Option(metavar="base|adapted", help="State of the model.")
    ] = "adapted",
    as_json: Json = False,
) -> None:
    """Show the utterances with the most errors, word by word."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.runs.report import error_view
        from blora_pyro.runs.utterances import choose, read_utterances, worst

        rows = choose(read_utterances(results), test_set, state)
        print_result(worst(rows, top), as_json, lambda: error_view(rows, top))


def diagnose(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the plots.", show_default="RUN/diagnostics")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="The .py file of the run's own prior, if it has one: its code is run."),
    ] = None,
    khat: Annotated[
        bool, typer.Option(help="Compute k-hat, on up to 64 training utterances.")
    ] = True,
    draws: Annotated[int, typer.Option(help="Draws for k-hat, 30 or more.")] = 30,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show where a fit adapted Whisper and how its prior shrank it; plot it."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.diagnostics.report import diagnosis_tables
        from blora_pyro.runs import diagnosis

        with TerminalProgress() as progress:
            found = diagnosis.diagnose(
                run,
                output,
                prior=prior,
                khat=khat,
                draws=draws,
                device=device,
                on_stage=progress.stage,
            )
        print_result(found.to_json(), as_json, lambda: diagnosis_tables(found))


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
    device: Device = "cpu",
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
    strength: Strength = 1.0,
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
        from blora_pyro.runs.folders import written_folder

        card = {"revision": revision, "base": base, "license": license}
        if output is not None:
            with written_folder(output, overwrite, run) as folder:
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


def priors(
    check: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Check a family: a name, or a .py file, whose code is run. Exit code 1 if a check "
            "fails.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the prior families and their arguments, or check that one keeps the contract."""
    with one_line_errors():
        quiet_libraries()
        if check is not None:
            return _check_prior(check, as_json)
        from blora_pyro.diagnostics.report import prior_tables
        from blora_pyro.families import FAMILIES
        from blora_pyro.guides import describe_prior

        families = {name: describe_prior(name) for name in FAMILIES}
        content = [
            {"name": name, "summary": text, "arguments": [asdict(one) for one in arguments]}
            for name, (text, arguments) in families.items()
        ]
        print_result(content, as_json, lambda: prior_tables(families))


def _check_prior(name: str, as_json: bool) -> None:
    """Print the checks of a family; exit code 1 if one failed."""
    from blora_pyro.diagnostics.report import family_tables
    from blora_pyro.guides import check_family

    report = check_family(name)
    print_result(asdict(report), as_json, lambda: family_tables(report))
    if not report.passed:
        raise typer.Exit(1)
