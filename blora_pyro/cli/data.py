"""`blora-pyro data`."""

from typing import Annotated

import typer

from blora_pyro.cli.common import (
    Column,
    Json,
    LanguageMap,
    LocalFilesOnly,
    Revision,
    one_line_errors,
    print_result,
    quiet_libraries,
)
from blora_pyro.cli.parameters import with_verbosity

data = typer.Typer(help="Check data.", no_args_is_help=True, add_completion=False)


@data.callback()
def main() -> None:
    """Check data."""


@data.command()
@with_verbosity
def check(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="As --data of fit: a folder, a manifest, de-en, ..."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, whose tokenizer and window are used.",
            show_default="pocket for built-in corpora; else what only a base can say is left out",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Check this split only.", show_default="all splits")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language of rows that name none.", show_default="none")
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="transcribe|translate", help="Task of the fit.")
    ] = "transcribe",
    language_map: LanguageMap = None,
    column: Column = None,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Check rows, texts and paths; open no audio.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check data before a fit: lengths, languages, bad rows, duplicates.

    Exit code 1 if a fit would refuse a row, 2 if a source can't be read at all.
    """
    with one_line_errors():
        quiet_libraries()
        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.diagnostics.data_check import check_data
        from blora_pyro.diagnostics.report import data_check_tables
        from blora_pyro.options import AUTO, column_names, language_map_of, read_columns

        with TerminalProgress() as progress:
            found = check_data(
                sources,
                base,
                split,
                language,
                progress.audio,
                revision,
                local_files_only,
                fast=fast,
                columns=column_names(read_columns(column or [])),
                task=task,
                language_map=language_map_of(language_map or AUTO),
            )
        print_result(found.to_json(), as_json, lambda: data_check_tables(found))
        if found.refused:
            raise typer.Exit(1)
