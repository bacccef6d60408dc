"""Transcribing with a run, by torch or by CTranslate2.

For CTranslate2 the posterior mean at its strength is merged, converted and kept in
`$BLORA_PYRO_CACHE/ctranslate2/`, a folder for each model, and another of its weights in eight bits.
Its name is a fingerprint of the run's files, of the strength, and of the base's files by size and
time or, on the Hub, by commit. So whoever comes again imports nothing of torch. The folder may be
deleted at any time.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blora_pyro import __version__
from blora_pyro.errors import UserError, check_positive, printable, reason
from blora_pyro.files import cache_dir, read_json, sync
from blora_pyro.hub import BASE, download, find_run
from blora_pyro.languages import language_code
from blora_pyro.options import AUTO, POCKET, TASKS
from blora_pyro.transcription.transcripts import Transcript

TORCH, CTRANSLATE2 = "torch", "ctranslate2"
ENGINES = (AUTO, TORCH, CTRANSLATE2)
LAYOUT = "2"  # of what is kept
NEEDED = (  # tokens that faster-whisper knows by name
    *("<|startoftranscript|>", "<|startofprev|>", "<|startoflm|>", "<|transcribe|>"),
    *("<|translate|>", "<|notimestamps|>"),
)
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
RUN_FILES = ("run.json", "posterior.safetensors")
COPIED = ["tokenizer.json", "preprocessor_config.json"]
EIGHT_BITS = "int8"
BATCH_SIZE = 16  # one by one a processor is faster in eight bits, see docs/costs.md
DTYPES = ("float32", "float16", EIGHT_BITS)
HALF_WRITTEN, HOUR = ".new", 3600.0
MOST_BEAMS = 100
LONGEST_CHAIN = 20  # adapters that lead to a base


def transcribe(
    audio: str | Path | Sequence[str | Path],
    adapter: str | Path | None = None,
    base: str | None = None,
    language: str | None = None,
    device: str = AUTO,
    *,
    engine: str = AUTO,
    word_timestamps: bool | None = False,
    beam_size: int = 1,
    vad_filter: bool = False,
    initial_prompt: str | None = None,
    hotwords: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    strength: float | None = None,
    strength_by: str = "scale",
    domain: str | None = None,
    dtype: str | None = None,
    task: str | None = None,
    batch_size: int | None = None,
    samples: int = 0,
    seed: int = 0,
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
    on_note: Callable[[str], object] = lambda note: None,
    **draws: Any,
) -> list[Transcript]:
    """Return transcripts of audio files, by a base model alone or adapted by a posterior mean.

    Args:
        audio: See `finished.transcribe`, as all that is not explained here.
        adapter: Run.
        base: Base model.
        language: Language.
        device: A torch device; `cpu`, `cuda` or `cuda:1` for CTranslate2.
        engine: `torch`; `ctranslate2`, which needs `pip install 'blora-pyro[fast]'`; or `auto`,
            the second if it is installed and can do what is asked for.
        word_timestamps: Find when each word is said; None does with `ctranslate2`.
        beam_size: Hypotheses of the beam search; 1 is greedy. This and the next three are for
            `ctranslate2` alone.
        vad_filter: Leave out what is no speech before decoding.
        initial_prompt: Text that a recording goes on from.
        hotwords: Words that are likely to be said.
        revision: Of the base.
        local_files_only: Ask nothing of the Hub.
        strength: Of the adapter's update.
        strength_by: See `at_strength`.
        domain: One of the run's domains.
        dtype: With `ctranslate2` what is computed in, `float32`, `float16` or `int8`; what it
            converts is float32.
        task: `transcribe` or `translate`.
        batch_size: Windows decoded at once; with `ctranslate2` recordings that fit one. None is 16,
            or 1 by `ctranslate2` in int8 on a processor.
        samples: Posterior draws, by `torch` alone.
        seed: Of draws, and of what is sampled.
        on_transcript: Called with each file's index and transcript, in order.
        on_error: Called with the index of a file that can't be read and the error; the file is left
            out. None raises.
        on_note: Called with the reason if `auto` takes `torch`, but for draws.
        **draws: `prior` and `trust_prior_file`.

    Raises:
        UserError: If a file or the run can't be read, the language is unknown to the model, or the
            engine can't do what is asked for.
    """
    if engine not in ENGINES:
        raise UserError(f"engine is '{engine}'; give one of {', '.join(ENGINES)}")
    check_positive(beam_size=beam_size, batch_size=BATCH_SIZE if batch_size is None else batch_size)
    if beam_size > MOST_BEAMS:
        raise UserError(f"beam_size is {beam_size}; give a whole number from 1 to {MOST_BEAMS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a whole number from 0 below {2**32}")
    own: dict[str, Any] = {
        "beam_size": beam_size,
        "vad_filter": vad_filter,
        "initial_prompt": _words("initial_prompt", initial_prompt),
        "hotwords": _words("hotwords", hotwords),
    }
    asked = [one for one, value in own.items() if value and (one != "beam_size" or value > 1)]
    if engine == TORCH and asked:
        raise UserError(
            f"{asked[0]} is given, which the engine {TORCH} does not have; leave it out, or give "
            f"engine {CTRANSLATE2}"
        )
    which = Which(adapter, base, revision, local_files_only, strength, strength_by, domain)
    decoder = None
    if engine != TORCH:
        try:
            if samples:
                raise UserError(
                    f"samples is {samples}, and the engine {CTRANSLATE2} has no draws; leave "
                    f"{asked[0] if asked else 'engine'} out"
                )
            settings = {**own, "word_timestamps": word_timestamps is not False}
            decoder = _decoder(which, language, device, dtype, task, batch_size, seed, settings)
        except UserError as error:
            if asked or engine == CTRANSLATE2 or dtype == EIGHT_BITS:  # torch has none of these
                raise
            if not samples:
                on_note(f"decoded by {TORCH}, which takes longer: {error}")
    paths = [audio] if isinstance(audio, str | Path) else audio
    if decoder is not None:
        from blora_pyro.transcription.ct2 import transcribe_files

        return transcribe_files(decoder, paths, on_transcript, on_error)
    from blora_pyro.models.folders import quiet_transformers
    from blora_pyro.runs import finished

    with quiet_transformers():
        return finished.transcribe(
            paths,
            adapter,
            base,
            language,
            device,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            task=task,
            strength=strength,
            strength_by=strength_by,
            domain=domain,
            batch_size=batch_size or BATCH_SIZE,
            samples=samples,
            seed=seed,
            word_timestamps=bool(word_timestamps),
            on_transcript=on_transcript,
            on_error=on_error,
            **draws,
        )


# ---- the converted model


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


def _words(name: str, text: str | None) -> str | None:
    """Return a text that is given to a decoder; None if it is blank."""
    text = (text or "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} is {printable(text)}, which is no Unicode text; give words in UTF-8"
        ) from None
    return text or None


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


def converted(which: Which, dtype: str = "float32") -> Path:
    """Return the folder of a model in CTranslate2's format, converted if it is not there yet.

    Args:
        which: The model.
        dtype: One of `DTYPES`. Weights that are stored in eight bits need not be rounded whenever
            they are loaded; for the others they are stored in float32.

    Raises:
        UserError: If the run or the base can't be read, the model is none for faster-whisper, or
            the folder can't be written.
    """
    from blora_pyro.transcription.ct2 import ABOUT

    if (root := cache_dir()) is None:
        raise UserError(
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
            _convert(which, folder, kind)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the converted model can't be written to {printable(folder.parent)} "
                f"({reason(error)}); set BLORA_PYRO_CACHE, or give engine {TORCH}"
            ) from None
    if why := _content(folder / ABOUT).get("unfit"):
        raise UserError(
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


def _convert(which: Which, folder: Path, kind: str | None) -> None:
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
                if posterior is not None:
                    with posterior.applied(base.net):
                        unmerged = probe(base.net)
                    posterior.merge(base.net)
                    check_merge(str(which.adapter), unmerged, probe(base.net))
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


def _decoder(
    which: Which,
    language: str | None,
    device: str,
    dtype: str | None,
    task: str | None,
    batch_size: int | None,
    seed: int,
    own: dict[str, Any],
) -> Any:
    """Return `ct2.Decoder`, loaded.

    Raises:
        UserError: If it can't do what is asked for.
    """
    if find_spec("faster_whisper") is None:
        raise UserError(
            f"the engine {CTRANSLATE2} is not installed; pip install 'blora-pyro[fast]', or give "
            f"engine {TORCH}"
        )
    import ctranslate2

    from blora_pyro.transcription.ct2 import About, Decoder, Settings

    if task not in (None, *TASKS):
        raise UserError(f"no task is called {task!r}; choose from {', '.join(TASKS)}")
    has_cuda = ctranslate2.get_cuda_device_count() > 0
    device = ("cuda" if has_cuda else "cpu") if device == AUTO else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or (device != "cpu" and not has_cuda):
        known = "cpu or cuda" if has_cuda else "cpu"
        raise UserError(
            f"device is '{device}', and the engine {CTRANSLATE2} can have {known} here; give that, "
            f"or engine {TORCH}"
        )
    can = ctranslate2.get_supported_compute_types(device.partition(":")[0])
    if dtype is not None and dtype not in (known_types := [one for one in DTYPES if one in can]):
        raise UserError(
            f"dtype is '{dtype}', and the engine {CTRANSLATE2} has {', '.join(known_types)} on "
            f"{device}; give one of them, or engine {TORCH}"
        )
    folder = converted(which, dtype or "float32")
    about = About.read(folder)
    if dtype is None:
        is_short = about.dtype != "float32" and device != "cpu" and "float16" in can
        dtype = "float16" if is_short else "float32"
    code = language_code(language) if language else about.language
    code = "" if code == AUTO else code
    size = batch_size or (1 if (device, dtype) == ("cpu", EIGHT_BITS) else BATCH_SIZE)
    settings = Settings(code or None, task or about.task, size, seed, **own)
    try:
        decoder = Decoder(folder, device, dtype, settings)
        if device != "cpu":
            decoder.check_device()
    except (RuntimeError, ValueError) as error:  # no memory, or a library of CUDA is missing
        raise UserError(
            f"the engine {CTRANSLATE2} can't be used on {device} ({reason(error)}); give device "
            f"cpu, or engine {TORCH}"
        ) from None
    decoder.check()
    if not code and about.multilingual and not decoder.model.is_multilingual:
        raise UserError(
            f"the engine {CTRANSLATE2} finds no language with a vocabulary that is not OpenAI's; "
            f"give language, or engine {TORCH}"
        )
    return decoder
