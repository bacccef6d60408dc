"""`blora-pyro transcribe`."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blora_pyro.cli.common import (
    RUN_HELP,
    Device,
    Domain,
    LocalFilesOnly,
    Overwrite,
    Revision,
    Strength,
    StrengthBy,
    Telling,
    echo,
    one_line_errors,
    print_error,
    print_json,
    verbosity,
)
from blora_pyro.cli.parameters import with_verbosity
from blora_pyro.errors import Interrupted, UserError, printable
from blora_pyro.options import AUTO

PATH = 4096  # characters of the longest
PATIENCE = 1.0  # seconds that pass without a bar, which takes a tenth of one to import

if TYPE_CHECKING:
    from blora_pyro.transcription.transcripts import Transcript


@with_verbosity
def transcribe(
    audio: Annotated[
        list[str],
        typer.Argument(help="Audio files (wav, mp3, m4a, webm, ...), or folders of them."),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help=RUN_HELP,
            show_default="the base model alone",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model.", show_default="the adapter's"),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="en, ...; de-en for code-switched speech; auto detects it in each file.",
            show_default="the adapter's data; without adapter, auto",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="transcribe|translate",
            help="Transcribe, or translate to English.",
            show_default="the adapter's, or transcribe",
        ),
    ] = None,
    strength: Strength = None,
    strength_by: StrengthBy = "scale",
    domain: Domain = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="text|json|srt|vtt",
            help="Format of the transcripts; json is a list, and in --output an object a file.",
        ),
    ] = "text",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for one file for each input.", show_default="standard output"),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Posterior draws for word confidences, which are in the JSON; 0 is none.",
        ),
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(
            metavar="auto|torch|ctranslate2",
            help="What decodes. ctranslate2 needs the extra fast, has no --samples, and keeps a "
            "converted model in the cache; auto takes it where it can do what is asked for.",
        ),
    ] = AUTO,
    word_timestamps: Annotated[
        bool,
        typer.Option(
            "--word-timestamps",
            help="Find when each word is said, for JSON and subtitles; with ctranslate2 subtitles "
            "have it anyway.",
        ),
    ] = False,
    beam_size: Annotated[
        int,
        typer.Option(
            help="Hypotheses of the beam search; 1 is greedy. Of ctranslate2 alone.",
        ),
    ] = 1,
    vad_filter: Annotated[
        bool,
        typer.Option(
            "--vad-filter", help="Leave out what is no speech before decoding. Of ctranslate2."
        ),
    ] = False,
    initial_prompt: Annotated[
        str | None,
        typer.Option(
            help="Text that a recording goes on from. Of ctranslate2.", show_default="none"
        ),
    ] = None,
    hotwords: Annotated[
        str | None,
        typer.Option(help="Words that are likely to be said. Of ctranslate2.", show_default="none"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Windows that are transcribed at once.",
            show_default="16; 1 by ctranslate2 in int8 on a processor",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    prior: Annotated[
        str | None,
        typer.Option(help="The .py file of the prior, if --samples needs one: its code is run."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip inputs whose file is in --output already.")
    ] = False,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the base; with ctranslate2 float32, float16 or int8.",
            show_default="the adapter's",
        ),
    ] = None,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Transcribe audio files of any length.

    A file that can't be read is reported and left out; the exit code is then 2.
    """
    with one_line_errors(), _interruptible(output):
        from blora_pyro.runs import engines
        from blora_pyro.transcription.outputs import Output, check_format, find_audio, render

        if as_json and form not in ("json", "text"):
            raise UserError(f"--json and --format {form} are given; give one")
        form = "json" if as_json else form
        check_format(form)
        if samples > 0 and form != "json":
            raise UserError(f"samples is {samples}, but {form} has no room for it; add --json")
        if word_timestamps and form == "text":
            raise UserError(
                "word_timestamps is given, but text has no room for it; give json, srt or vtt as "
                "--format"
            )

        def note(text: str) -> None:
            echo(f"note: {text}", err=True)

        files, written = find_audio(audio, note), None
        if output is not None:
            written = Output.plan(files, output, form, overwrite, resume)
            files = written.files
        elif resume or overwrite:
            raise UserError("--resume and --overwrite are about files; give --output")
        elif form in ("srt", "vtt") and len(files) > 1:
            raise UserError(f"{form} is a file an input, and there are {len(files)}; give --output")

        def show(index: int, transcript: "Transcript") -> None:
            if written is not None:
                written.write(index, transcript)
            elif form == "text" and len(files) > 1:
                echo(f"{printable(transcript.audio, PATH)}: {transcript.text}")
            elif form != "json":
                echo(render(transcript, form), nl=False)

        with _Bar(len(files), shown=output is not None or not sys.stdout.isatty()) as bar:
            done = engines.transcribe(
                [file.path for file in files],
                adapter,
                base,
                language,
                device,
                dtype=dtype,
                revision=revision,
                local_files_only=local_files_only,
                prior=prior,
                on_transcript=show,
                on_error=bar.fail,
                on_progress=bar.count,
                on_stage=bar.stage,
                on_note=note if verbosity.get().verbose else lambda text: None,
                task=task,
                strength=strength,
                strength_by=strength_by,
                domain=domain,
                batch_size=batch_size,
                samples=samples,
                seed=seed,
                engine=engine,
                beam_size=beam_size,
                word_timestamps=word_timestamps or (None if form in ("srt", "vtt") else False),
                vad_filter=vad_filter,
                initial_prompt=initial_prompt,
                hotwords=hotwords,
            )
        if output is not None:
            echo(f"{len(done)} written to {output}")
        elif form == "json" and done:
            print_json([transcript.to_json() for transcript in done])
        if bar.failed:
            raise typer.Exit(2)


@contextmanager
def _interruptible(output: Path | None) -> Iterator[None]:
    """Have SIGTERM, too, end what is done as Ctrl-C does, and say what is whole."""

    def interrupt(signum: int, _: object) -> None:
        raise Interrupted(signum)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if output is None:
            raise
        message = f"interrupted; what was written to {output} is whole, --resume goes on"
        raise Interrupted(getattr(error, "signum", signal.SIGINT), message) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Bar:
    """Tells on stderr how many files are done, or how much of one, and counts those that failed."""

    def __init__(self, files: int, shown: bool) -> None:
        self._telling, self._shown = Telling(), shown or files == 1
        self._files, self._done, self.failed = files, 0.0, 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._telling.stop()

    def stage(self, name: str) -> None:
        """Print what is done before anything is decoded."""
        self._telling.say(f"{name} ...", "dim")

    def count(self, files: float) -> None:
        """Show how many files are done, to a tenth, and of one to a hundredth."""
        if not self._shown or time.monotonic() - self._telling.began < PATIENCE:
            return
        if (done := round(files, 2 if self._files == 1 else 1)) > self._done:
            self._done = done
            self._telling.count("transcribing", done, self._files)

    def fail(self, _: int, error: UserError) -> None:
        """Count a file that can't be read, and print why."""
        self.failed += 1
        print_error(error)
