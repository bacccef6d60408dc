"""Files that are replaced as a whole: whoever reads, finds the old one or the new one."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError

_NAME = re.compile(r"[\w-][\w.-]*")
_LONGEST = 200  # bytes: file systems take 255, endings included


def sync(path: Path) -> None:
    """Have the content of a file or the entries of a folder on the disk, not in a buffer."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in the place of the one at `path`, whole and on the disk.

    Raises:
        OSError: If that fails; what was at `path` is still there.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content)
        sync(fresh)
        os.replace(fresh, path)
        sync(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)  # it may be what fills the disk
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_name(name: object, what: str) -> str:
    """Return a name that becomes a part of a path: it can lead to no other folder.

    Args:
        name: Of a file's content, or of an option.
        what: It names, for the message.

    Raises:
        UserError: If it is not made of letters, digits, '.', '-' and '_', or begins with a dot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST:
        raise UserError(
            f"{what} is called {name!r:.80}; give a name of letters, digits, '.', '-' and '_', "
            f"without a dot at its start and of {_LONGEST} bytes at most"
        )
    return name


def parse_json(text: str | bytes) -> Any:
    """Return the content of JSON.

    Raises:
        ValueError: If it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is no JSON.
    """
    return parse_json(path.read_bytes())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole and on the disk."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, text.encode())


def cache_dir() -> Path | None:
    """Return the folder for what can be made again, `$BLORA_PYRO_CACHE`; None if that is empty.

    It is `~/.cache/blora-pyro` by default (None where there is no home folder), and may be deleted
    at any time.
    """
    folder = os.environ.get("BLORA_PYRO_CACHE", "~/.cache/blora-pyro")
    try:
        return Path(folder).expanduser() if folder else None
    except RuntimeError:
        return None
