"""Commands that list runs and show what one is, and `priors`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import (
    STRENGTH_DEFAULT,
    STRENGTH_HELP,
    Column,
    Device,
    Json,
    Overwrite,
    RunFolder,
    StrengthBy,
    echo,
    help_of,
    one_line_errors,
    print_result,
    quiet_libraries,
)
from blora_pyro.cli.parameters import with_options, with_verbosity
from blora_pyro.declarations import flag_of, metavar_of
from blora_pyro.errors import UserError, check_positive
from blora_pyro.options import AUTO, PRIOR_OPTIONS, FitConfig


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Searched at any depth.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> None:
    """List the runs in a folder, the newest first: options, new domain, forgetting.

    A run that has not ended well is listed, too, with what is wrong with it.
    """
    with one_line_errors():
        from blora_pyro.runs.listing import list_runs, run_tables

        found = list_runs(folder)
        content = [run.to_json() for run in found]
        print_result(content, as_json, lambda: run_tables(folder, found))


def show(
    run: RunFolder,
    other: Annotated[Path | None, typer.Argument(metavar="OTHER", help="A second run.")] = None,
    as_json: Json = False,
) -> None:
    """Show a run: errors, sizes and options; or what differs between two, with paired intervals."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.runs.shown import ShownRun, show_run, side_by_side

        shown = ShownRun.read(run)
        content, parts = (
            show_run(shown) if other is None else side_by_side(shown, ShownRun.read(other))
        )
        print_result(content, as_json, lambda: parts)


@with_verbosity
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
        str | None,
        typer.Option(
            metavar="S|S,S,...|START:STOP:STEP",
            help=f"{STRENGTH_HELP}. Several, such as 0:1:0.1, give a curve.",
            show_default=STRENGTH_DEFAULT,
        ),
    ] = None,
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
    beyond: Annotated[
        bool,
        typer.Option(
            help="Also measure what the adapter changes beside the words, on the backward sets: "
            "detected languages, translation, timestamps, capitals, punctuation, and words in "
            "silence and noise."
        ),
    ] = False,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Score a run, base and adapted, on its own sets or on another; or at several strengths."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.posterior.strength import parse_strengths
        from blora_pyro.runs import finished
        from blora_pyro.runs.report import fit_tables

        strengths = () if strength is None else parse_strengths(strength)
        if len(strengths) > 1:
            if data is not None or output is not None or domain is not None or beyond:
                raise UserError(
                    "--data, --domain, --output and --beyond are for a single strength; leave them "
                    "out"
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
                strength=strengths[0] if strengths else None,
                strength_by=strength_by,
                domain=domain,
                column=column,
                beyond=beyond,
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


@with_verbosity
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders or Hub ids of a run, or of several."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The HTML file.",
            show_default="RUN/report.html; of several runs report.html here",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(help="Utterances shown, of those that adaptation changed the most.")
    ] = 200,
    samples: Annotated[
        int,
        typer.Option(
            metavar="K", help="Also show how sure the model is of each word, by K posterior draws."
        ),
    ] = 0,
    prior: Annotated[
        str | None,
        typer.Option(help="The .py file of the run's own prior, if it has one: its code is run."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = AUTO,
) -> None:
    """Write a page on a run, or on several beside each other: one HTML file, to open in a browser.

    A fit writes it into its folder.
    """
    with one_line_errors():
        check_positive(top=top)
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.runs.report_page import write_report

        with TerminalProgress() as progress:
            file = write_report(
                runs,
                output,
                top=top,
                samples=samples,
                prior=prior,
                overwrite=overwrite,
                device=device,
                progress=progress,
            )
        echo(f"report: {file}")


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
    broken: Annotated[
        bool,
        typer.Option(
            "--broken",
            help="Utterances in which the base had more words right than the adapted model.",
        ),
    ] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Those in which it had fewer right.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the utterances with the most errors, word by word, or what adaptation changed."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.runs.report import change_view, error_view
        from blora_pyro.runs.utterances import (
            BROKEN,
            FIXED,
            changed,
            choose,
            read_utterances,
            worst,
        )

        if broken or fixed:
            if (broken and fixed) or state != "adapted":
                one = "--fixed" if fixed else "--broken"
                other = f"--state {state}" if state != "adapted" else "--broken"
                given = f"{other} and {one}"
                raise UserError(f"{given} are given; give one of --broken, --fixed and --state")
            check_positive(top=top)
            found, how = changed(read_utterances(results), test_set), BROKEN if broken else FIXED
            shown = found[how][:top]
            return print_result(shown, as_json, lambda: change_view(found, how, top))
        rows = choose(read_utterances(results), test_set, state)
        print_result(worst(rows, top), as_json, lambda: error_view(rows, top))


@with_verbosity
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
        bool,
        typer.Option(
            "--khat",
            help="Compute k-hat and PSIS-LOO, too, on up to 64 training utterances: minutes on a "
            "real Whisper.",
        ),
    ] = False,
    draws: Annotated[int, typer.Option(help="Draws for k-hat and LOO, 30 or more.")] = 30,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Show where a fit adapted Whisper and how its prior shrank it; plot it."""
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.diagnostics.report import Diagnosis, closing_lines, figure_tables
        from blora_pyro.runs import diagnosis
        from blora_pyro.tables import print_report

        def show(found: Diagnosis) -> None:
            if not as_json:
                print_report(figure_tables(found))

        with TerminalProgress() as progress:
            found = diagnosis.diagnose(
                run,
                output,
                prior=prior,
                khat=khat,
                draws=draws,
                device=device,
                on_stage=progress.stage,
                on_figures=show,
            )
        print_result(found.to_json(), as_json, lambda: closing_lines(found))


@with_verbosity
@with_options(FitConfig, only=PRIOR_OPTIONS)
def priors(
    given: dict[str, Any],
    check: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Check a family: a name, or a .py file, whose code is run. Exit code 1 if a check "
            "fails.",
        ),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict",
            help="Tell how far draws of --prior move --base on utterances of --data (16, or "
            "--max-utterances), before anything is fitted. The other options belong to it.",
        ),
    ] = False,
    draws: Annotated[int, typer.Option(help="Draws for --predict.")] = 8,
    as_json: Json = False,
) -> None:
    """List the prior families and their arguments, check one, or tell how far its draws go."""
    with one_line_errors():
        if predict and check is not None:
            raise UserError("check and predict are both given; give one of them")
        if given and not predict:
            raise UserError(f"{flag_of(FitConfig, next(iter(given)))} is given without --predict")
        quiet_libraries()
        if predict:
            return _predict_prior(FitConfig(**given), draws, as_json)
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


def _predict_prior(config: FitConfig, draws: int, as_json: bool) -> None:
    """Print how far draws of the prior move the base."""
    from blora_pyro.cli.progress import TerminalProgress
    from blora_pyro.runs.diagnosis import predict_prior, prediction_tables

    with TerminalProgress() as progress:
        found = predict_prior(config, draws, progress)
    print_result(found.to_json(), as_json, lambda: prediction_tables(found))


def _check_prior(name: str, as_json: bool) -> None:
    """Print the checks of a family; exit code 1 if one failed."""
    from blora_pyro.diagnostics.report import family_tables
    from blora_pyro.guides import check_family

    report = check_family(name)
    print_result(asdict(report), as_json, lambda: family_tables(report))
    if not report.passed:
        raise typer.Exit(1)
