"""`blora-pyro sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import Json, one_line_errors, print_json, quiet_libraries
from blora_pyro.cli.parameters import with_options
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig


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
            help="Search beta, lr, prior_scale or another argument of the prior, on a logarithmic "
            "scale; may be given repeatedly.",
            show_default="beta=1e-6:1e-3 and prior_scale=0.01:0.3",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database for the Optuna study: sqlite:///FILE, postgresql+psycopg://...",
            show_default="OUTPUT/study.log",
        ),
    ] = None,
    study_name: Annotated[
        str | None, typer.Option(help="In the storage.", show_default="name of the output")
    ] = None,
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
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.sweeps import sweeping
        from blora_pyro.sweeps.report import sweep_tables
        from blora_pyro.tables import print_report

        with TerminalProgress() as progress:
            found = sweeping.sweep(
                output,
                trials=trials,
                search=_ranges(search) if search else None,
                storage=storage,
                study_name=study_name,
                timeout=timeout,
                progress=progress,
                **options,
            )
        if as_json:
            print_json(found.to_json())
        else:
            print_report(sweep_tables(found))


def _ranges(texts: list[str]) -> dict[str, tuple[float, float]]:
    """`name=low:high` texts, none given twice."""
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
