"""`blora-pyro compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro.cli.common import Device, Json, one_line_errors, print_json, quiet_libraries
from blora_pyro.errors import UserError


def compare(
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
        typer.Option(metavar="[NAME=]SOURCE,...", help="The first is what is chosen on."),
    ] = "de-en,es-en,zh-en",
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="The first, likewise.")] = "0,1,2",
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
        bool, typer.Option("--chosen-only", help="No test of the values beside the chosen ones.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is done and what is to do.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Fit nothing: tables of the rows that are there.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database by which machines without a common folder share the rows: "
            "postgresql+psycopg://..., sqlite:///FILE",
            show_default="none: processes share OUTPUT",
        ),
    ] = None,
    study_name: Annotated[
        str | None, typer.Option(help="In the storage.", show_default="name of the output")
    ] = None,
    base: Annotated[
        str, typer.Option(help="'pocket', a Whisper checkpoint folder, or a Hub id.")
    ] = "pocket",
    backward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="A held-out set of what the base already knows; may be given repeatedly.",
            show_default="the six pocket languages for the pocket base",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of one process.", show_default="one a core")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compare methods over domains, seeds and settings; print the table of the paper.

    Every method's knob is chosen on dev sets, by the mean of new-domain and backward error, and the
    chosen value is scored on test sets. Stopped at any moment, the same command goes on; started
    again in another terminal, or with --storage on another machine, meanwhile, the two share the
    work.
    """
    with one_line_errors():
        quiet_libraries()
        import torch

        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.comparison import compare_methods, files
        from blora_pyro.tables import print_report

        if threads is not None:
            if threads < 1:
                raise UserError(f"threads is {threads}; give a whole number above 0")
            torch.set_num_threads(threads)
        options: dict[str, Any] = {"base": base, "device": device}
        with TerminalProgress() as progress:
            comparison = compare_methods(
                output,
                methods=None if methods is None else _parts(methods),
                domains=_parts(domains),
                seeds=_numbers(seeds),
                settings=_parts(settings),
                row=row,
                only_choose=only_choose,
                neighbours=not chosen_only,
                work=not (dry_run or report),
                storage=storage,
                study_name=study_name,
                progress=progress,
                **options,
                **({} if backward is None else {"backward": backward}),
            )
        if dry_run:
            print_report(files.plan_lines(comparison))
            return
        lines, content = files.report(comparison)
        if as_json:
            print_json(content)
        else:
            print_report(lines)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _parts(text)]
    except ValueError:
        raise UserError(f"seeds is '{text}'; give whole numbers, such as 0,1,2") from None
