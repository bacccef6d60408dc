"""`transcribe` by CTranslate2 and by torch, against faster-whisper used directly.

    python benchmarks/engines.py --base openai/whisper-base --speech DIR

All take turns on the same recordings: one short file as a whole process, and warm a long file and
forty short ones. `--speech` has audio files of one language, `--language`; the long one is made of
them. Seconds are of the wall and, as other work on the machine moves those, of the CPU.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
from common import Results, interleaved, parse, parser, print_table, shown, spread

from blora_pyro.data import AUDIO_SUFFIXES, SAMPLING_RATE, read_audio
from blora_pyro.metrics.normalizers import Normalizer
from blora_pyro.runs.engines import Which, converted, transcribe

THEIRS, CT2, TORCH = "faster-whisper", "ctranslate2", "torch"
FILES, LONG = 40, 137.0  # seconds
DIRECTLY = """
import sys
from faster_whisper import WhisperModel
folder, audio, language, threads = sys.argv[1:]
model = WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=int(threads))
segments, _ = model.transcribe(
    audio, language=language, beam_size=1, without_timestamps=True, condition_on_previous_text=False
)
print("".join(segment.text for segment in segments))
"""


def main() -> None:
    """Print what each engine takes, and how many words differ from faster-whisper's."""
    options = parser(__doc__)
    options.add_argument("--base", required=True, help="folder or Hub id of a Whisper")
    options.add_argument("--speech", type=Path, required=True, help="folder of audio files")
    options.add_argument("--language", default="en")
    options.add_argument("--pattern", default="*", help="of the files' names")
    options.add_argument("--rounds", type=int, default=3)
    arguments = parse(options)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    found = sorted(arguments.speech.rglob(arguments.pattern))
    files = [file for file in found if file.suffix in AUDIO_SUFFIXES][
        : 4 if arguments.quick else FILES
    ]
    if not files:
        sys.exit(f"no audio in {arguments.speech}")
    results = Results(arguments, base=Path(arguments.base).name, files=len(files))
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / "long.wav"
        waves = [read_audio({"path": str(file)}) for file in files]
        repeated = np.tile(np.concatenate(waves), 20)[: round(LONG * SAMPLING_RATE)]
        soundfile.write(long, repeated, SAMPLING_RATE, subtype="FLOAT")
        kinds = {"one short file, a process": files[:1], f"{len(files)} short files": files}
        if not arguments.quick:
            kinds[f"{LONG:g} s in one file"] = [long]
        rows = []
        for name, those in kinds.items():
            make = processes if "process" in name else warm
            case = results.case(name, partial(measured, make, arguments, those, rounds))
            for one in (THEIRS, CT2, f"{THEIRS}, int8", f"{CT2}, int8", TORCH):
                if one in case:
                    words = f"{case[one]['words']:.1%}"
                    rows.append(
                        (name, one, shown(case[one]["cpu"]), shown(case[one]["wall"]), words)
                    )
        heads = ("", "engine", "CPU, s", "wall, s", "words that differ")
        print_table(heads, rows)


def measured(make: Callable[..., Any], arguments: Any, files: list[Path], rounds: int) -> Any:
    """Return seconds by engine, and the share of faster-whisper's words that are other ones."""
    calls: Mapping[str, Callable[[], list[str]]] = make(arguments, files)
    said: dict[str, list[str]] = {}
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        before = cpu_seconds()
        said[name] = calls[name]()
        cpu[name].append(cpu_seconds() - before)

    wall = interleaved({name: partial(timed, name) for name in calls}, rounds, warm_up=1)
    normalizer = Normalizer()
    texts = {name: [normalizer(text) or "-" for text in those] for name, those in said.items()}
    return {
        name: {
            "cpu": spread(cpu[name][1:]),
            "wall": spread(wall[name]),
            "words": jiwer.wer(texts[THEIRS], texts[name]),
        }
        for name in calls
    }


def processes(arguments: Any, files: list[Path]) -> dict[str, Callable[[], list[str]]]:
    """Whole processes for one file; the model is converted before."""
    folder, file = converted(of(arguments.base)), str(files[0])
    ours = [sys.executable, "-m", "blora_pyro", "transcribe", file, "--base", arguments.base]
    ours += ["--language", arguments.language, "--device", "cpu", "--engine"]
    threads = str(arguments.threads)
    commands = {
        THEIRS: [sys.executable, "-c", DIRECTLY, str(folder), file, arguments.language, threads],
        CT2: [*ours, CT2],
        TORCH: [*ours, TORCH],
    }

    def call(command: list[str]) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [done.stdout.strip()]

    return {name: partial(call, command) for name, command in commands.items()}


def warm(arguments: Any, files: list[Path]) -> dict[str, Callable[[], list[str]]]:
    """All files in this process; of ours every call loads its model, of theirs none."""
    from faster_whisper import WhisperModel

    folder = str(converted(of(arguments.base)))
    long = len(files) == 1

    def theirs(model: Any) -> list[str]:
        options = {"beam_size": 1, "condition_on_previous_text": False}
        options |= {"language": arguments.language, "without_timestamps": not long}
        found = (model.transcribe(str(file), **options)[0] for file in files)
        return ["".join(one.text for one in segments) for segments in found]

    def ours(**options: Any) -> list[str]:
        given = {"base": arguments.base, "language": arguments.language, "device": "cpu"}
        return [one.text for one in transcribe(files, **given, **options)]

    calls: dict[str, Callable[[], list[str]]] = {}
    for kind, end in (("float32", ""), ("int8", ", int8")):
        load = {"device": "cpu", "compute_type": kind, "cpu_threads": arguments.threads}
        calls[THEIRS + end] = partial(theirs, WhisperModel(folder, **load))
        calls[CT2 + end] = partial(ours, engine=CT2, dtype=kind)
    return {**calls, TORCH: partial(ours, engine=TORCH)}


def of(base: str) -> Which:
    """Return a base alone."""
    return Which(None, base, None, False, None, "scale", None)


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


if __name__ == "__main__":
    main()
