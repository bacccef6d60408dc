"""`blora-pyro study`, and its short forms `compare` and `sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import Json, one_line_errors, print_json, quiet_libraries
from blora_pyro.cli.parameters import with_options, with_verbosity
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig

# What a comparison sets itself, or a method
SET_BY_COMPARE = (
    *("data", "test", "dev", "data_weights", "max_utterances", "steps", "epochs", "seed"),
    *("pooling", "pooling_scale", "streaming", "shuffle_buffer", "prior_from", "prior_inflation"),
    *("prior", "prior_scale", "prior_args", "guide", "beta", "lr", "eval_every", "patience"),
)
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database by which machines without a common folder share the fits: "
        "postgresql+psycopg://..., sqlite:///FILE",
        show_default="OUTPUT/study.db",
    ),
]
StudyName = Annotated[
    str | None, typer.Option(help="In the database.", show_default="name of the output")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what is done and what is to do.")]
Report = Annotated[
    bool, typer.Option("--report", help="Fit nothing: tables of the rows that are there.")
]
Threads = Annotated[
    int | None, typer.Option(help="Of one process.", show_default="one for each core")
]


@with_verbosity
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file; see docs/studies.md.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run folders.", show_default="the file's, or runs/FILE"),
    ] = None,
    dry_run: DryRun = False,
    report: Report = False,
    storage: Storage = None,
    study_name: StudyName = None,
    code: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py",
            help="A prior or guide of your own that the study file names, and that may be run.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A torch device, in place of the file's.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the study that a file defines, go on with it, and show its tables.

    A study fits methods to data sets with seeds, or searches for the best options. Every fit is a
    run folder. Stopped at any moment, the same command goes on; started again in another terminal,
    or with --storage on another machine, the processes share the fits.
    """
    with one_line_errors():
        from blora_pyro.studies.study_file import open_study, study_of

        content, output, results = open_study(file, output)
        if device is not None:
            content["options"] = {**content.get("options", {}), "device": device}
        where = {"storage": storage, "study_name": study_name}
        if "search" in content:
            _search(
                content, str(file), output, dry_run or report, code or [], threads, as_json, **where
            )
            return
        defined = study_of(content, str(file), code or [])
        _run(
            defined,
            output,
            results,
            None,
            dry_run,
            report,
            threads,
            as_json,
            **where,
        )


@with_verbosity
@with_options(FitConfig, leave_out=SET_BY_COMPARE)
def compare(
    given: dict[str, Any],
    output: Annotated[
        Path, typer.Option(help="Folder for rows and tables; what is there is not made again.")
    ] = Path("runs/compare"),
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,...",
            help="Some of them; the base model, LoRA, and what one builds on are always there.",
            show_default="all",
        ),
    ] = None,
    domains: Annotated[
        str,
        typer.Option(metavar="[NAME=]SOURCE,...", help="Values are chosen on the first."),
    ] = "de-en,es-en,zh-en",
    seeds: Annotated[
        str, typer.Option(metavar="N,N,...", help="Values are chosen with the first.")
    ] = "0,1,2",
    settings: Annotated[
        str,
        typer.Option(metavar="UTTERANCESxSTEPS,...", help="'all' is every utterance: allx400."),
    ] = "150x600,400x400",
    row: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD:VALUE",
            help="Only this, nothing is chosen; after it the value of what it builds on, such as "
            "scaled-lora:0.5:0.003.",
        ),
    ] = None,
    only_choose: Annotated[
        bool, typer.Option("--only-choose", help="Stop after the choice on dev.")
    ] = False,
    chosen_only: Annotated[
        bool, typer.Option("--chosen-only", help="No test of the values next to the chosen ones.")
    ] = False,
    dry_run: DryRun = False,
    report: Report = False,
    storage: Storage = None,
    study_name: StudyName = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare methods over domains, seeds and settings; print the table of the paper.

    Every method's knob is chosen on dev sets, by the mean of new-domain and backward error, and the
    chosen value is scored on test sets. A short form of 'study'. Stopped at any moment, the same
    command goes on; started again in another terminal, or with --storage on another machine, the
    processes share the work. The options of 'fit' hold for all fits.
    """
    with one_line_errors():
        options = FitConfig.with_given(given, given).given_options
        from blora_pyro.studies.study_file import short_study

        defined = short_study(
            methods=None if methods is None else _parts(methods),
            data=_parts(domains),
            seeds=_numbers(seeds),
            settings=_parts(settings),
            row=row,
            only_choose=only_choose,
            neighbours=not chosen_only,
            options=options,
        )
        where = {"storage": storage, "study_name": study_name}
        _run(defined, output, None, "compare", dry_run, report, threads, as_json, **where)


def _run(
    defined: Any,
    output: Path,
    results: Path | None,
    name: str | None,
    dry_run: bool,
    report: bool,
    threads: int | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Run a study, or show what is there."""
    _set_threads(threads)
    quiet_libraries()
    from blora_pyro.cli.progress import TerminalProgress
    from blora_pyro.studies.report import write_report
    from blora_pyro.studies.running import run_study
    from blora_pyro.tables import print_report

    with TerminalProgress() as progress:
        work = not (dry_run or report)
        run = run_study(defined, output, results=results, work=work, progress=progress, **where)
        if dry_run:
            run.load_bases()
    if dry_run:
        print_report(run.plan.describe(run.finished_runs()))
        return
    lines, content = write_report(run, name)
    if as_json:
        print_json(content)
    else:
        print_report(lines)


@with_verbosity
@with_options(FitConfig)
def sweep(
    given: dict[str, Any],
    output: Annotated[
        Path, typer.Option(help="Folder of the sweep, with a run folder for every trial.")
    ] = Path("runs/sweep"),
    trials: Annotated[int, typer.Option(help="Trials to be finished in all.")] = 20,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH",
            help="Search beta, lr, prior_scale, another option that is a number, or an argument of "
            "the prior, on a logarithmic scale; may be given repeatedly.",
            show_default="beta=1e-6:1e-3 and prior_scale=0.01:0.3",
        ),
    ] = None,
    storage: Storage = None,
    study_name: StudyName = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which no further trial begins.", show_default="none"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search beta and the prior's scale for low dev errors, new domain and backward.

    Shows the Pareto front and its knee. The same command goes on with a sweep that was stopped, and
    may run several times at once; test sets are not touched. All other options are those of 'fit'.
    """
    with one_line_errors():
        dev = {"dev": given.pop("dev")} if "dev" in given else {}  # a fit asks for more
        options = {**FitConfig.with_given(given, given).given_options, **dev}
        ranges = _ranges(search) if search else None
        about = {"trials": trials, "timeout": timeout, "storage": storage, "study_name": study_name}
        _sweep(options, output, ranges, as_json, **about)


def _search(
    content: dict[str, Any],
    file: str,
    output: Path,
    dry_run: bool,
    code: list[str],
    threads: int | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Run the search of a study file."""
    from blora_pyro.studies.study_file import search_of

    _set_threads(threads)
    options, ranges, about = search_of(content, file, code)
    _sweep(options, output, ranges, as_json, dry_run=dry_run, **about, **where)


def _sweep(
    options: dict[str, Any],
    output: Path,
    ranges: dict[str, tuple[float, float]] | None,
    as_json: bool,
    **about: Any,
) -> None:
    quiet_libraries()
    from blora_pyro.cli.progress import TerminalProgress
    from blora_pyro.studies import search as searching
    from blora_pyro.studies.search_report import search_tables, write_search
    from blora_pyro.tables import print_report

    with TerminalProgress() as progress:
        found = searching.sweep(options, output, search=ranges, progress=progress, **about)
    lines = search_tables(found) if about.get("dry_run") else write_search(found)
    if as_json:
        print_json(found.to_json())
    else:
        print_report(lines)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"threads is {threads}; give a whole number above 0")
    import torch

    torch.set_num_threads(threads)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _parts(text)]
    except ValueError:
        raise UserError(f"seeds is '{text}'; give whole numbers, such as 0,1,2") from None


def _ranges(texts: list[str]) -> dict[str, tuple[float, float]]:
    """Return `name=low:high` texts as ranges, none given twice."""
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, ends = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            raise UserError(
                f"search is '{text}'; give name=low:high, such as beta=1e-6:1e-3"
            ) from None
        if name in ranges:
            raise UserError(f"search gives '{name}' twice; give it once")
        ranges[name] = low, high
    return ranges
