"""Models converted for CTranslate2, which are kept.

The posterior mean at its strength is merged, converted and kept in
`$BLORA_PYRO_CACHE/ctranslate2/`, a folder for each model, and another of its weights in eight bits.
Its name is a fingerprint of the run's files, of the strength, and of the base's files by size and
time or, on the Hub, by commit. So whoever comes again imports nothing of torch. The folder may be
deleted at any time.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blora_pyro import __version__
from blora_pyro.errors import UserError, printable, reason
from blora_pyro.files import cache_dir, read_json, sync
from blora_pyro.hub import BASE, download, find_run
from blora_pyro.options import POCKET

TORCH, CTRANSLATE2 = "torch", "ctranslate2"
LAYOUT = "3"  # of what is kept
NEEDED = (  # tokens that faster-whisper knows by name
    *("<|startoftranscript|>", "<|startofprev|>", "<|startoflm|>", "<|transcribe|>"),
    *("<|translate|>", "<|notimestamps|>"),
)
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
RUN_FILES = ("run.json", "posterior.safetensors")
COPIED = ["tokenizer.json", "preprocessor_config.json"]
EIGHT_BITS = "int8"
HALF_WRITTEN, HOUR = ".new", 3600.0
LONGEST_CHAIN = 20  # adapters that lead to a base


class EngineError(UserError):
    """What CTranslate2 can't do, and torch may."""


@dataclass(frozen=True)
class Which:
    """Which model transcribes; for the attributes see `transcribe`."""

    adapter: str | Path | None
    base: str | None
    revision: str | None
    local_files_only: bool
    strength: float | None
    strength_by: str
    domain: str | None

    @property
    def fingerprint(self) -> str:
        """A text that changes with the model.

        Raises:
            UserError: If a Hub id can't be found.
        """
        parts: list[Any] = [LAYOUT, __version__, self.strength, self.strength_by, self.domain]
        base, revision = self.base, self.revision
        if self.adapter is not None:
            folder = find_run(self.adapter, self.local_files_only)
            parts += [_digest(folder / name) for name in RUN_FILES]
            config = _content(folder / RUN_FILES[0]).get("config")
            config = config if isinstance(config, dict) else {}
            revision = revision if base or revision else _text(config.get("revision"))
            base = base or _text(config.get("base"))
        parts.append(_base_key(base, revision, self.local_files_only))
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]


# What can't be is as if it were not there: whoever loads the model tells of it.


def _digest(file: Path) -> str:
    if not file.is_file():  # but a pipe, or a device without an end
        return ""
    try:
        with open(file, "rb") as content:
            return file_digest(content, "sha256").hexdigest()
    except OSError:
        return ""


def _content(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _base_key(name: str | None, revision: str | None, local: bool, above: int = 0) -> list[Any]:
    """Return what changes with a base: its files, or its commit, and the base below an adapter."""
    if name in (None, POCKET):
        return [name]
    if (folder := Path(str(name))).is_dir():
        about = [(one.name, one.stat()) for one in sorted(folder.iterdir()) if one.is_file()]
        key: list[Any] = [str(folder.resolve())]
        key += [[file, one.st_size, one.st_mtime_ns, one.st_ctime_ns] for file, one in about]
    else:
        folder = download(BASE, str(name), revision, local, ["config.json", "adapter_config.json"])
        key = [str(folder)]  # which ends in the commit
    below = _content(folder / "adapter_config.json")
    if below and above < LONGEST_CHAIN:
        under = _text(below.get("base_model_name_or_path")), _text(below.get("revision"))
        key.append(_base_key(*under, local, above + 1))
    return key


def converted(
    which: Which, dtype: str = "float32", on_begin: Callable[[], object] = lambda: None
) -> Path:
    """Return the folder of a model in CTranslate2's format, converted if it is not there yet.

    Args:
        which: The model.
        dtype: One of `engines.DTYPES`. Weights that are stored in eight bits need not be rounded
            whenever they are loaded; for the others they are stored in float32.
        on_begin: Called before it is converted, which takes some seconds.

    Raises:
        EngineError: If the model is none for faster-whisper, or the folder can't be written.
        UserError: If the run or the base can't be read.
    """
    from blora_pyro.transcription.ct2 import ABOUT

    if (root := cache_dir()) is None:
        raise EngineError(
            f"the engine {CTRANSLATE2} keeps a converted model in the folder BLORA_PYRO_CACHE, "
            f"which is empty; set it, or give engine {TORCH}"
        )
    kind = EIGHT_BITS if dtype == EIGHT_BITS else None
    folder = root / "ctranslate2" / "-".join([which.fingerprint, *([kind] if kind else [])])
    if not _is_whole(folder):
        try:
            if folder.is_file():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            _convert(which, folder, kind, on_begin)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the converted model can't be written to {printable(folder.parent)} "
                f"({reason(error)}); set BLORA_PYRO_CACHE, or give engine {TORCH}"
            ) from None
    if why := _content(folder / ABOUT).get("unfit"):
        raise EngineError(
            f"the engine {CTRANSLATE2} can't take the model: {why}; give engine {TORCH}"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether a converted model is there, and as it was written."""
    from blora_pyro.transcription.ct2 import ABOUT, About

    about = _content(folder / ABOUT)
    if "unfit" in about:
        return _text(about["unfit"]) is not None
    try:
        sizes = About.read(folder).sizes
        return bool(sizes) and sizes == _sizes(folder, sizes)
    except (OSError, ValueError):
        return False


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def _convert(which: Which, folder: Path, kind: str | None, on_begin: Callable[[], object]) -> None:
    """Write a converted model, whole; whoever is first with it wins."""
    from blora_pyro.models import base_of
    from blora_pyro.models.base import check_merge, probe
    from blora_pyro.models.decoding import timestamp_begin
    from blora_pyro.models.folders import quiet_transformers
    from blora_pyro.runs.finished import adapted
    from blora_pyro.transcription.ct2 import ABOUT, About

    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"*{HALF_WRITTEN}"):  # of a killed process
        if time.time() - left.stat().st_mtime > HOUR:
            shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(suffix=HALF_WRITTEN, dir=folder.parent))
    try:
        with quiet_transformers():
            posterior, config, language = adapted(**vars(which))
            base = base_of(replace(config, device="cpu", dtype="float32"))
            about: dict[str, Any] = {"unfit": _unfit(base)}
            if about["unfit"] is None:
                on_begin()
                if posterior is not None:
                    with posterior.applied(base.net):
                        unmerged = probe(base.net)
                    try:
                        posterior.merge(base.net)
                        check_merge(str(which.adapter), unmerged, probe(base.net))
                    except UserError as error:
                        raise EngineError(str(error)) from None
                settings = base.net.generation_config
                base.save_pretrained(fresh / "merged")
                _by_ctranslate2(fresh / "merged", fresh / "made", kind)
                shutil.rmtree(fresh / "merged")
                about = asdict(
                    About(
                        language or "",
                        config.task,
                        config.dtype,
                        base.language_map,
                        timestamp_begin(base) is not None,
                        bool(settings.is_multilingual),
                        list(settings.suppress_tokens or ()),
                        base.net.config.max_target_positions,
                        _sizes(fresh / "made", sorted(os.listdir(fresh / "made"))),
                    )
                )
        (fresh / "made").mkdir(exist_ok=True)
        (fresh / "made" / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        for one in (*(fresh / "made").iterdir(), fresh / "made"):
            sync(one)
        with suppress(OSError):  # another process was first
            os.rename(fresh / "made", folder)
        if not (folder / ABOUT).is_file():
            raise OSError(None, "it can't be renamed", str(folder))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unfit(base: Any) -> str | None:
    vocabulary = base.tokenizer.get_vocab()
    absent = [name for name in NEEDED if name not in vocabulary]
    if absent or not set(NO_SPEECH) & vocabulary.keys():
        return f"its tokenizer has no {(absent or NO_SPEECH)[0]}"
    return None


def _by_ctranslate2(merged: Path, out: Path, kind: str | None) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(merged), copy_files=COPIED).convert(str(out), quantization=kind)
