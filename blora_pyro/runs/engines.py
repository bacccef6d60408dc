"""Transcribing with a run, by torch or by CTranslate2."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError, check_positive, printable, reason
from blora_pyro.languages import language_code
from blora_pyro.options import AUTO, TASKS
from blora_pyro.runs.conversion import CTRANSLATE2, EIGHT_BITS, TORCH, EngineError, Which, converted
from blora_pyro.transcription.transcripts import Transcript

ENGINES = (AUTO, TORCH, CTRANSLATE2)
DTYPES = ("float32", "float16", EIGHT_BITS)
BATCH_SIZE = 16  # one by one a processor is faster in eight bits, see docs/costs.md
MOST_BEAMS = 100


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
    on_progress: Callable[[float], object] = lambda files: None,
    on_stage: Callable[[str], object] = lambda name: None,
    on_note: Callable[[str], object] = lambda note: None,
    prior: str | None = None,
    trust_prior_file: bool = False,
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
        on_progress: Called with how many files are done, and what part of those that are decoded.
        on_stage: Called with what is done before anything is decoded, if a model is converted.
        on_note: Called with the reason if `auto` takes `torch`, but for draws.
        prior: The file of the prior, for draws of a run that has one: its code is run.
        trust_prior_file: Run the file that the run names.

    Raises:
        UserError: If a file or the run can't be read, the language is unknown to the model, or the
            engine can't do what is asked for.
    """
    if engine not in ENGINES:
        raise UserError(f"engine is '{engine}'; give one of {', '.join(ENGINES)}")
    check_positive(batch_size=batch_size)
    if not (isinstance(beam_size, int) and 1 <= beam_size <= MOST_BEAMS):
        raise UserError(f"beam_size is {beam_size}; give a whole number from 1 to {MOST_BEAMS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a whole number from 0 below {2**32}")
    if dtype not in (None, "bfloat16", *DTYPES):
        raise UserError(
            f"dtype is '{dtype}'; give float32 or float16, or bfloat16 with the engine {TORCH}, "
            f"or {EIGHT_BITS} with {CTRANSLATE2}"
        )
    own: dict[str, Any] = {
        "beam_size": beam_size,
        "vad_filter": vad_filter,
        "initial_prompt": _words("initial_prompt", initial_prompt),
        "hotwords": _words("hotwords", hotwords),
    }
    asked = [one for one, value in own.items() if value and (one != "beam_size" or value > 1)]
    asked += [f"dtype {EIGHT_BITS}"] * (dtype == EIGHT_BITS)
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
                raise EngineError(
                    f"samples is {samples}, and the engine {CTRANSLATE2} has no draws; leave "
                    f"{asked[0] if asked else 'engine'} out, or samples"
                )
            settings = {**own, "word_timestamps": word_timestamps is not False}
            decoder = _decoder(
                which, language, device, dtype, task, batch_size, seed, settings, on_stage
            )
        except EngineError as error:
            if asked or engine == CTRANSLATE2:  # torch has none of these
                raise
            if not samples:
                on_note(f"decoded by {TORCH}, which takes longer: {error}")
    paths = [audio] if isinstance(audio, str | Path) else audio
    if decoder is not None:
        from blora_pyro.transcription.ct2 import transcribe_files

        return transcribe_files(decoder, paths, on_transcript, on_error, on_progress)
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
            on_progress=on_progress,
            prior=prior,
            trust_prior_file=trust_prior_file,
        )


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


def _decoder(
    which: Which,
    language: str | None,
    device: str,
    dtype: str | None,
    task: str | None,
    batch_size: int | None,
    seed: int,
    own: dict[str, Any],
    on_stage: Callable[[str], object],
) -> Any:
    """Return `ct2.Decoder`, loaded.

    Raises:
        EngineError: If it can't do what is asked for.
        UserError: If the model can't be read, or a task is unknown.
    """
    if find_spec("faster_whisper") is None:
        raise EngineError(
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
        raise EngineError(
            f"device is '{device}', and the engine {CTRANSLATE2} can have {known} here; give that, "
            f"or engine {TORCH}"
        )
    can = ctranslate2.get_supported_compute_types(device.partition(":")[0])
    if dtype is not None and dtype not in (known_types := [one for one in DTYPES if one in can]):
        raise EngineError(
            f"dtype is '{dtype}', and the engine {CTRANSLATE2} has {', '.join(known_types)} on "
            f"{device}; give one of them, or engine {TORCH}"
        )
    begin = partial(on_stage, f"converting the model for {CTRANSLATE2}, once")
    folder = converted(which, dtype or "float32", begin)
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
    except (RuntimeError, ValueError) as error:  # no memory, a library of CUDA, a damaged file
        raise EngineError(
            f"the engine {CTRANSLATE2} can't be used on {device} with its model in "
            f"{printable(folder)} ({reason(error)}); delete that folder, which is made again, give "
            f"another device, or engine {TORCH}"
        ) from None
    decoder.check()
    if not code and about.multilingual and not decoder.model.is_multilingual:
        raise EngineError(
            f"the engine {CTRANSLATE2} finds no language with a vocabulary that is not OpenAI's; "
            f"give language, or engine {TORCH}"
        )
    return decoder
