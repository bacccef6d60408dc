"""Files and folders that are replaced as a whole: whoever reads, finds the old one or the new one.

A lock of the operating system, which ends with its process, keeps two from writing at once.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: there are no locks
    fcntl = None  # type: ignore[assignment]

_WINDOWS = os.name == "nt"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NAME = re.compile(r"[\w-][\w.-]*")
_LOCK = ".{}.lock"  # a folder's, beside it, or in it where nothing can be written beside it
_LONGEST = 200  # bytes: file systems take 255, endings included


def sync(path: Path) -> None:
    """Have the content of a file or the entries of a folder on the disk, not in a buffer.

    Nothing is done on Windows, where a folder can't be opened, nor a file that is only read synced.
    """
    if _WINDOWS:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, shared: bool = False) -> None:
    """Put a file in the place of the one at `path`, whole and on the disk.

    Args:
        path: Of the file.
        content: Of the file.
        shared: Whether another process may write it at the same moment; the later one stays.

    Raises:
        OSError: If that fails; what was at `path` is still there.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    fresh = path.with_name(f"{path.name}{own}.new")
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


def read_file(path: Path) -> bytes:
    """Return the content of a file; not of a pipe, which waits, nor of a device without an end.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is no file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is no file, but a pipe or a device")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is no file, or holds no JSON object, or one that can't be written again.
    """
    text = read_file(path)
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if rb"\ud" in text.lower():  # half a surrogate pair, maybe
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it is not valid Unicode") from None
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole and on the disk."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, text.encode())


# ---- folders


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on what is written to `path`, a folder that need not exist.

    It is a lock on the file `.NAME.lock` beside it, which the operating system frees with the
    process. Where a system or a file system has no locks there is none.

    Raises:
        UserError: If another holds it.
        OSError: If its file can't be written.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    place = path.parent if os.access(path.parent, os.W_OK) or not path.is_dir() else path
    file = place / _LOCK.format(path.name)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"'{path}' is being written by another process; wait for it, or give another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                os.close(descriptor)
                raise
        if _is_at(descriptor, file):  # not removed by its last holder in the meantime
            break
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Return whether a process writes to a folder, see `locked`; None where that can't be told."""
    if fcntl is None:
        return None
    path = path.resolve()
    for file in (place / _LOCK.format(path.name) for place in (path.parent, path)):
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return False


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextmanager
def new_folder(path: Path, own: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder that takes the place of the one at `path` as a whole at the end.

    At an error, or a kill at any moment, the earlier one is there as it was. Of what that holds,
    names that match a pattern of `own` go with it, and the rest stays. A folder that can't be
    renamed (it is mounted, or where a program is at work) gets the new files one by one at the end,
    the one that `own` has first as the last of them.

    Raises:
        UserError: If another process writes to `path`.
        OSError: If it can't be written.
    """
    path = path.resolve()
    fixed = path.is_dir() and (
        path.is_mount() or Path.cwd().is_relative_to(path) or not os.access(path.parent, os.W_OK)
    )
    fresh, old = (
        path / f".{end}" if fixed else path.with_name(f".{path.name}.{end}")
        for end in ("new", "old")
    )
    with locked(path):
        if old.exists() and not path.exists():  # killed between two renames
            os.rename(old, path)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir()
        try:
            yield fresh
            for one in (*fresh.rglob("*"), fresh):
                sync(one)
            rest = [one for one in path.iterdir() if one != fresh] if path.is_dir() else []
            rest = [one for one in rest if not any(fnmatch(one.name, name) for name in own)]
            if fixed:
                _move(fresh, path, rest, own)
            else:
                for one in rest:
                    _link(one, fresh / one.name)
                _put(fresh, path, old)
            sync(path.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)


def _move(fresh: Path, path: Path, rest: Sequence[Path], own: Sequence[str]) -> None:
    """Move what a folder holds into another, of whose content the rest stays.

    What `own` has first is removed first and comes last: without it a folder is no whole one.
    """
    key = own[0] if own else None
    for one in sorted(path.iterdir(), key=lambda one: one.name != key):
        if one != fresh and (one not in rest or (fresh / one.name).exists()):
            remove(one)
    for one in sorted(fresh.iterdir(), key=lambda one: one.name == key):
        os.replace(one, path / one.name)


def _link(old: Path, new: Path) -> None:
    """Have a file or folder in a second place, too, unless something is there."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other, follow_symlinks=False)
        except (OSError, NotImplementedError):  # a file system without hard links, or Windows
            shutil.copy2(one, other, follow_symlinks=False)

    if os.path.lexists(new):
        return
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=link)
    else:
        link(str(old), str(new))


def _put(fresh: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another: in one step, where the system has one."""
    import ctypes

    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    names = os.fsencode(fresh), os.fsencode(path)
    if not path.exists():
        os.rename(fresh, path)
    elif swap is None or swap(_HERE, names[0], _HERE, names[1], _EXCHANGE):
        os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            os.rename(old, path)
            raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
