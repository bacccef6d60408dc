"""`blora-pyro transcribe`."""

from pathlib import Path
from typing import Annotated

import typer

from blora_pyro.cli.common import (
    Device,
    Json,
    LocalFilesOnly,
    Revision,
    one_line_errors,
    print_json,
)


def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="wav, flac, ogg/opus or mp3 files.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a fit.", show_default="the base model alone")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the adapter's, or pocket")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="en, or de-en for code-switched speech.",
            show_default="the adapter's data; without adapter, detected",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the base's weights.", show_default="the adapter's")
    ] = None,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Json = False,
) -> None:
    """Transcribe audio files, a line each."""
    with one_line_errors():
        from blora_pyro import runs

        texts = runs.transcribe(
            audio, adapter, base, language, device, dtype, revision, local_files_only
        )
        if as_json:
            rows = zip(audio, texts, strict=True)
            print_json([{"audio": str(path), "text": text} for path, text in rows])
        else:
            for path, text in zip(audio, texts, strict=True):
                typer.echo(text if len(audio) == 1 else f"{path}: {text}")
