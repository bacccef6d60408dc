"""Files: the audio to transcribe, as many at a time as fit, and the transcripts written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora_pyro.data import AUDIO_SUFFIXES
from blora_pyro.errors import UserError, printable
from blora_pyro.files import replace_file
from blora_pyro.transcription.transcripts import Transcript, srt, vtt

FORMATS: dict[str, tuple[str, Callable[[Transcript], str]]] = {  # suffix and content
    "text": (".txt", lambda transcript: transcript.text + "\n"),
    "json": (
        ".json",
        lambda transcript: json.dumps(transcript.to_json(), indent=2, ensure_ascii=False) + "\n",
    ),
    "srt": (".srt", srt),
    "vtt": (".vtt", vtt),
}
SHOWN = 3  # names of files that are left out


@dataclass(frozen=True)
class AudioFile:
    """A file to transcribe.

    Attributes:
        path: Path of the file.
        name: Path relative to the given folder, or the file name.
    """

    path: Path
    name: Path


def find_audio(
    paths: Sequence[str | Path], on_note: Callable[[str], object] = lambda note: None
) -> list[AudioFile]:
    """The given files, and all audio files in and below the given folders, sorted.

    A missing file is reported only when it is read; `on_note` is called with a line on the files of
    a folder that are left out.

    Raises:
        UserError: If a folder holds no audio file, or a path is empty.
    """
    if "" in paths:  # which would be the folder that one is in
        raise UserError("a path is empty; give audio files, or folders of them")
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(AudioFile(path, Path(path.name)))
            continue
        all_files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [file for file in all_files if file.suffix.lower() in AUDIO_SUFFIXES]
        if not inside:
            raise UserError(f"folder '{path}' holds no audio file ({', '.join(AUDIO_SUFFIXES)})")
        if others := [str(file) for file in all_files if file not in set(inside)]:
            named = ", ".join(map(printable, others[:SHOWN])) + ", ..." * (len(others) > SHOWN)
            on_note(
                f"left out of {printable(path)}: {len(others)} not named as audio "
                f"({', '.join(AUDIO_SUFFIXES)}): {named}"
            )
        files += [AudioFile(path / file, file) for file in inside]
    return files


def check_format(form: str) -> None:
    """Raise UserError unless `form` is a known format."""
    if form not in FORMATS:
        raise UserError(f"format is '{form}'; choose from {', '.join(FORMATS)}")


def render(transcript: Transcript, form: str) -> str:
    """The content of a transcript file in the format `form`."""
    return FORMATS[form][1](transcript)


@dataclass(frozen=True)
class Output:
    """Transcript files to write.

    Attributes:
        files: Audio files to transcribe.
        paths: Path of each one's transcript.
        form: Format of the transcripts.
    """

    files: list[AudioFile]
    paths: list[Path]
    form: str

    @classmethod
    def plan(
        cls,
        files: Sequence[AudioFile],
        folder: Path,
        form: str,
        overwrite: bool = False,
        resume: bool = False,
    ) -> "Output":
        """Plan one transcript per input: its name below `folder`, with the format's suffix.

        `overwrite` writes over existing transcripts, `resume` skips their inputs.

        Raises:
            UserError: If two inputs would be written to one path, a transcript exists already, or
                the folder can't be created.
        """
        if overwrite and resume:
            raise UserError("--overwrite and --resume are given; give one")
        taken: dict[Path, AudioFile] = {}
        for file in files:
            path = folder / file.name.with_suffix(FORMATS[form][0])
            if path in taken and taken[path].path.resolve() == file.path.resolve():
                continue  # given twice
            if path in taken:
                raise UserError(
                    f"'{taken[path].path}' and '{file.path}' would both be written to '{path}'; "
                    "transcribe them into two folders"
                )
            taken[path] = file
        there = [] if overwrite else [path for path in taken if path.exists()]
        if there and not resume:
            raise UserError(
                f"'{there[0]}' is there already; --resume to leave out what is, or --overwrite"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output '{folder}' can't be made ({error.strerror})") from None
        left = {path: file for path, file in taken.items() if path not in there}
        return cls(list(left.values()), list(left), form)

    def write(self, index: int, transcript: Transcript) -> None:
        """Write the transcript of `files[index]`, atomically; UserError if it can't be written."""
        path = self.paths[index]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, render(transcript, self.form).encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise UserError(
                f"'{path}' can't be written ({error.strerror}); what came before it is; --resume "
                "to go on with it"
            ) from None


def in_groups(
    paths: Sequence[str | Path],
    read: Callable[[str | Path], Any],
    is_full: Callable[[list[Any]], bool],
    transcribe: Callable[[list[Any], Callable[[float], object]], list[Transcript]],
    on_transcript: Callable[[int, Transcript], None],
    on_error: Callable[[int, UserError], None] | None,
    on_progress: Callable[[float], object],
) -> list[Transcript]:
    """Return the transcripts of files, in their order, as many at a time as one group takes.

    Args:
        paths: The files.
        read: Returns a file's recording.
        is_full: Whether recordings are a group.
        transcribe: Returns the transcripts of a group, and calls with the share that is done.
        on_transcript: See `transcriber.transcribe_files`, as the next two.
        on_error: Called with what `read` raises.
        on_progress: Called with the number of files.

    Raises:
        UserError: As `transcribe`, and as `read` without `on_error`.
    """
    done: list[Transcript] = []
    waiting: dict[int, Any] = {}
    before = 0

    def tell(share: float) -> None:
        on_progress(before + share * (index + 1 - before))

    for index, path in enumerate(paths):
        try:
            waiting[index] = read(path)
        except UserError as error:
            if on_error is None:
                raise
            on_error(index, error)
        if waiting and (index == len(paths) - 1 or is_full([*waiting.values()])):
            for place, transcript in zip(
                waiting, transcribe([*waiting.values()], tell), strict=True
            ):
                on_transcript(place, transcript)
                done.append(transcript)
            waiting, before = {}, index + 1
    return done
