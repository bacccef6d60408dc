"""Manifests: one JSON object a line, one line an utterance."""

import json
import os
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Features, List, Value

from blora_pyro.errors import UserError

# Not `Audio` itself: encoding a path with it needs torchcodec; casting to it does not.
_FEATURES = Features(
    {
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "text": Value("string"),
        "language": Value("string"),
        "word_languages": List(Value("string")),
        "duration": Value("float64"),
    }
)


def read_manifest(path: str | Path) -> Dataset:
    """Read a JSONL manifest into memory; blank lines and further columns are dropped.

    The columns, of which a line must give the first two:
        audio: `Audio(decode=False)`, {"path", "bytes"}; relative to the manifest's folder.
        text: the transcript.
        language: a Whisper code ("de"), or several, matrix language first ("de-en"); else "".
        word_languages: a code for each token of the text; else [].
        duration: seconds; else None.

    Raises:
        UserError: if the file cannot be read or has no rows, or a line is not such a row.
    """
    path = Path(path)
    try:
        # Not splitlines: JSON may hold U+2028 and other line ends of Unicode as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # missing, a folder, not UTF-8
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the manifest {str(path)!r}: {reason}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_row(_parse(line), path.parent))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from error.__cause__
    if not rows:
        raise UserError(f"{path} has no rows; give a JSON object with audio and text on each line")
    return Dataset.from_list(rows, features=_FEATURES).cast_column("audio", Audio(decode=False))


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {line.strip()[:40]!r}") from error
    if not isinstance(row, dict):
        raise UserError(f"not a JSON object: {line.strip()[:40]!r}")
    return row


def _row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    if missing := [name for name in ("audio", "text") if name not in row]:
        raise UserError(f"no {' and no '.join(missing)}; a row needs audio and text")
    codes = [] if row.get("word_languages") is None else row["word_languages"]
    if not isinstance(codes, list):
        raise UserError(f"word_languages must be a list of texts, got {_shown(codes)}")
    audio = folder / _text("audio", row["audio"])
    if not os.path.isfile(audio):
        raise UserError(f"the audio file {str(audio)!r} does not exist")
    return {
        "audio": {"bytes": None, "path": str(audio)},
        "text": _text("text", row["text"]),
        "language": "" if row.get("language") is None else _text("language", row["language"]),
        "word_languages": [_text("word_languages", code) for code in codes],
        "duration": _seconds(row.get("duration")),
    }


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        raise UserError(f"{name} is not valid Unicode: {_shown(value)}") from error
    return value


def _seconds(value: object) -> float | None:
    if value is None or value != value:  # JSON's NaN
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise UserError(f"duration must be a number of seconds, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    return json.dumps(value)[:40]
