"""What a fit has learned: `evaluate`, `errors`, `diagnose`; and `priors`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import (
    NORMALIZER_HELP,
    STRENGTH_HELP,
    Device,
    Json,
    Overwrite,
    RunFolder,
    StrengthBy,
    one_line_errors,
    print_json,
)
from blora_pyro.errors import UserError


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Set to score.", show_default="the fit's test sets")
    ] = None,
    normalizer: Annotated[
        str | None, typer.Option(help=NORMALIZER_HELP, show_default="the fit's")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL file for the results of every utterance."),
    ] = None,
    strength: Annotated[
        str,
        typer.Option(
            metavar="S|S,S,...|START:STOP:STEP",
            help=f"{STRENGTH_HELP}. Several, such as 0:1:0.1, draw the curve.",
        ),
    ] = "1",
    strength_by: StrengthBy = "scale",
    split: Annotated[
        str, typer.Option(metavar="test|dev", help="Of the sets; dev to choose a strength by.")
    ] = "test",
    domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a fit with --pooling hierarchical or none: score this domain's adapter.",
            show_default="as after the fit: each domain's on its set, the shared one on the others",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Of a curve: png, pdf or svg.", show_default="RUN/strength.png"
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score a run again, base and adapted, on its own sets or on another; or at many strengths."""
    with one_line_errors():
        from blora_pyro.posterior.strength import parse_strengths
        from blora_pyro.reports.progress import TerminalProgress
        from blora_pyro.runs import finished
        from blora_pyro.runs.report import fit_tables
        from blora_pyro.tables import print_report

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
            )
        if as_json:
            print_json(metrics)
        else:
            print_report([*fit_tables(metrics), *([f"utterances: {output}"] if output else [])])


def _draw_curve(run: Path, strengths: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """What `evaluate` does with several strengths."""
    from blora_pyro.reports.progress import TerminalProgress
    from blora_pyro.runs.report import strength_tables
    from blora_pyro.runs.strength_curves import strength_curve
    from blora_pyro.tables import print_report

    with TerminalProgress() as progress:
        curve = strength_curve(run, strengths, progress, **options)
    if as_json:
        print_json(curve)
    else:
        print_report(strength_tables(curve))


def errors(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder of a fit, or what 'evaluate --output' has written."
        ),
    ],
    top: Annotated[int, typer.Option(help="How many utterances.")] = 10,
    test_set: Annotated[
        str | None,
        typer.Option("--set", help="new_domain or a backward set.", show_default="all"),
    ] = None,
    state: Annotated[str, typer.Option(help="Of the model: base or adapted.")] = "adapted",
    as_json: Json = False,
) -> None:
    """Show the utterances with the most errors, word by word."""
    with one_line_errors():
        from blora_pyro.runs.report import error_view
        from blora_pyro.runs.utterances import choose, read_utterances, worst

        rows = choose(read_utterances(results), test_set, state)
        if as_json:
            print_json(worst(rows, top))
        else:
            from blora_pyro.tables import print_report

            print_report(error_view(rows, top))


def diagnose(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the plots.", show_default="RUN/diagnostics")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="The .py file of the prior, if the run has one: its code is run."),
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
        from blora_pyro.diagnostics.report import diagnosis_tables
        from blora_pyro.reports.progress import TerminalProgress
        from blora_pyro.runs import diagnosis
        from blora_pyro.tables import print_report

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
        if as_json:
            print_json(found.to_json())
        else:
            print_report(diagnosis_tables(found))


def priors(as_json: Json = False) -> None:
    """List the prior families and their arguments."""
    with one_line_errors():
        from blora_pyro.families import FAMILIES
        from blora_pyro.guides import describe_prior

        families = {name: describe_prior(name) for name in FAMILIES}
        if as_json:
            print_json(
                [
                    {"name": name, "summary": text, "arguments": [asdict(one) for one in arguments]}
                    for name, (text, arguments) in families.items()
                ]
            )
        else:
            from blora_pyro.diagnostics.report import prior_tables
            from blora_pyro.tables import print_report

            print_report(prior_tables(families))
