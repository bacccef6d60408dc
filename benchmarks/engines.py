"""`transcribe` by CTranslate2 and by torch, against faster-whisper used directly.

    python benchmarks/engines.py --base openai/whisper-base --speech DIR --threads 2

All take turns on the same recordings: one short file and a long one as a whole process, and with
the model loaded a long file and forty short ones. `--speech` has audio files of one language,
`--language`; the long one is made of them. Seconds are of the wall and, as other work on the
machine moves those, of the CPU.

Texts and the times of words are compared twice: with faster-whisper as it is, which ends a short
recording in zeros of the log-mel, and with the settings of ours, for which it is given silence up
to the window's end, as OpenAI's decoder and a fit have it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
from common import Results, interleaved, parse, parser, print_table, rounded, shown, spread

from blora_pyro.data import AUDIO_SUFFIXES, SAMPLING_RATE, read_audio
from blora_pyro.metrics.normalizers import Normalizer
from blora_pyro.runs.conversion import Which, converted
from blora_pyro.runs.engines import transcribe

THEIRS, CT2, TORCH, INT8 = "faster-whisper", "ctranslate2", "torch", ", int8"
ENGINES = (THEIRS, CT2, f"{THEIRS}{INT8}", f"{CT2}{INT8}", TORCH)
FILES, LONG, WINDOW = 40, 137.0, 30.0  # the last two in seconds
NEAR = 0.2  # seconds between two times of a word that are called the same
GREEDY = {"beam_size": 1, "condition_on_previous_text": False}
DIRECTLY = """
import sys
from faster_whisper import WhisperModel
folder, audio, language, threads, kind, long = sys.argv[1:]
model = WhisperModel(folder, device="cpu", compute_type=kind, cpu_threads=int(threads))
segments, _ = model.transcribe(
    audio,
    language=language,
    beam_size=1,
    without_timestamps=not int(long),
    condition_on_previous_text=False,
)
print("".join(segment.text for segment in segments))
"""

Calls = dict[str, Callable[[], list[str]]]
normalised = Normalizer()  # as of error rates
Timed = list[tuple[str, float, float]]  # words, normalised, and when they begin and end


def main() -> None:
    """Print what each engine takes, and how far texts and times are from faster-whisper's."""
    options = parser(__doc__)
    options.add_argument("--base", required=True, help="folder or Hub id of a Whisper")
    options.add_argument("--speech", type=Path, required=True, help="folder of audio files")
    options.add_argument("--language", default="en")
    options.add_argument("--pattern", default="*", help="of the files' names")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--texts", action="store_true", help="texts and times of words alone")
    arguments = parse(options)
    quick = arguments.quick
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    found = sorted(arguments.speech.rglob(arguments.pattern))
    files = [one for one in found if one.suffix in AUDIO_SUFFIXES][: 2 if quick else FILES]
    if not files:
        sys.exit(f"no audio in {arguments.speech}")
    settings = {"language": arguments.language, "rounds": 1 if quick else arguments.rounds}
    results = Results(arguments, base=Path(arguments.base).name, files=len(files), **settings)
    results.summary["texts"] = stored(results).get("texts", {})  # of other languages, too
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / "long.wav"
        waves = [read_audio({"path": str(file)}) for file in files]
        repeated = np.resize(np.concatenate(waves), round(LONG * SAMPLING_RATE))
        soundfile.write(long, repeated, SAMPLING_RATE, subtype="FLOAT")
        kinds: dict[str, tuple[Callable[..., Calls], list[Path]]] = {
            "one short file, a process": (processes, files[:1]),
            f"{len(files)} short files": (warm, files),
            f"{LONG:g} s in one file": (warm, [long]),
            f"{LONG:g} s in one file, a process": (processes, [long]),
        }
        rows = []
        wanted = 0 if arguments.texts else 2 if quick else len(kinds)
        for name, (make, those) in [*kinds.items()][:wanted]:
            case = results.case(name, partial(measured, make, arguments, those, settings["rounds"]))
            rows += [
                (name, one, shown(case[one]["cpu"]), shown(case[one]["wall"]), share(case[one]))
                for one in ENGINES
            ]
    if rows:
        print_table(("", "engine", "CPU, s", "wall, s", "words that differ"), rows)
    compared = agreement(arguments, waves, files)
    if results.path is not None:
        keep(results, arguments.language, compared)
    heads = ("against", "engine", "words", "that differ", "shared", f"within {NEAR} s")
    print_table(heads, [row for name, case in compared.items() for row in lines(name, case)])


def stored(results: Results) -> dict[str, Any]:
    """Return what the file of results holds, if there is one."""
    if results.path is None or not results.path.is_file():
        return {}
    content: dict[str, Any] = json.loads(results.path.read_text(encoding="utf-8"))
    return content


def keep(results: Results, language: str, compared: dict[str, Any]) -> None:
    """Write how texts and times of a language compare; those of others stay as they are."""
    assert results.path is not None
    content = stored(results)
    texts = {**content.get("texts", {}), language: {**results.about, "against": compared}}
    content = {**content, "texts": dict(sorted(texts.items()))}
    results.path.write_text(json.dumps(rounded(content), indent=1) + "\n", encoding="utf-8")


def share(case: Mapping[str, Any]) -> str:
    """Return the share of words that differ."""
    return f"{case['words']:.1%}"


def lines(name: str, case: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Yield the rows of a table of texts and times."""
    for engine, one in case.items():
        near = f"{one['near']:.1%}" if one["shared"] else "-"
        yield name, engine, one["of"], share(one), one["shared"], near


# ---- seconds


def measured(make: Callable[..., Calls], arguments: Any, files: list[Path], rounds: int) -> Any:
    """Return seconds by engine, and the share of faster-whisper's words that are other ones."""
    calls = make(arguments, files)
    said: dict[str, list[str]] = {}
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        before = cpu_seconds()
        said[name] = calls[name]()
        cpu[name].append(cpu_seconds() - before)

    if len(files) > 1:  # libraries start and models load with a single file
        for call in make(arguments, files[:1]).values():
            call()
    warm_up = 1 if len(files) == 1 and not arguments.quick else 0
    wall = interleaved({name: partial(timed, name) for name in calls}, rounds, warm_up)
    texts = {name: [normalised(text) or "-" for text in those] for name, those in said.items()}
    return {
        name: {
            "cpu": spread(cpu[name][warm_up:]),
            "wall": spread(wall[name]),
            "words": jiwer.wer(texts[THEIRS], texts[name]),
        }
        for name in calls
    }


def processes(arguments: Any, files: list[Path]) -> Calls:
    """Whole processes for one file; the model is converted before."""
    file = str(files[0])
    long = soundfile.info(file).duration > WINDOW
    ours = [sys.executable, "-m", "blora_pyro", "transcribe", file, "--base", arguments.base]
    ours += ["--language", arguments.language, "--device", "cpu", "--engine"]
    commands = {TORCH: [*ours, TORCH]}
    for kind, end in (("float32", ""), ("int8", INT8)):
        folder = str(converted(of(arguments.base), kind))
        theirs = [folder, file, arguments.language, str(arguments.threads), kind, str(int(long))]
        commands[THEIRS + end] = [sys.executable, "-c", DIRECTLY, *theirs]
        commands[CT2 + end] = [*ours, CT2, "--dtype", kind]

    def call(command: list[str]) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [done.stdout.strip()]

    return {name: partial(call, command) for name, command in commands.items()}


def warm(arguments: Any, files: list[Path]) -> Calls:
    """All files in this process; of ours every call loads its model, of theirs none."""
    from faster_whisper import WhisperModel

    short = len(files) > 1 or soundfile.info(files[0]).duration <= WINDOW

    def theirs(model: Any) -> list[str]:
        options = {**GREEDY, "language": arguments.language, "without_timestamps": short}
        found = (model.transcribe(str(file), **options)[0] for file in files)
        return ["".join(one.text for one in segments) for segments in found]

    def ours(**options: Any) -> list[str]:
        return [one.text for one in transcribe(files, **given(arguments), **options)]

    calls: Calls = {TORCH: partial(ours, engine=TORCH)}
    for kind, end in (("float32", ""), ("int8", INT8)):
        load = {"device": "cpu", "compute_type": kind, "cpu_threads": arguments.threads}
        folder = str(converted(of(arguments.base), kind))
        calls[THEIRS + end] = partial(theirs, WhisperModel(folder, **load))
        calls[CT2 + end] = partial(ours, engine=CT2, dtype=kind)
    return calls


# ---- texts and times


def agreement(arguments: Any, waves: Sequence[Any], files: list[Path]) -> dict[str, Any]:
    """Return words that differ and times that are near, against faster-whisper in both ways."""
    from faster_whisper import WhisperModel

    folder = str(converted(of(arguments.base)))
    model = WhisperModel(folder, compute_type="float32", cpu_threads=arguments.threads)
    length = round(WINDOW * SAMPLING_RATE)
    filled = [np.pad(wave, (0, max(0, length - len(wave)))) for wave in waves]
    options = {**GREEDY, "language": arguments.language, "without_timestamps": True}
    said: dict[str, list[str]] = {}
    timed: dict[str, list[Timed]] = {}
    for name, those in {"as it is": waves, "with silence after": filled}.items():
        found = [[*model.transcribe(wave, **options)[0]] for wave in those]
        said[name] = ["".join(one.text for one in segments) for segments in found]
        found = [[*model.transcribe(wave, word_timestamps=True, **options)[0]] for wave in those]
        timed[name] = [
            times(word for one in segments for word in one.words or ()) for segments in found
        ]
    ours = {
        engine: transcribe(files, **given(arguments), engine=engine, word_timestamps=True)
        for engine in (CT2, TORCH)
    }
    found_in_ours = {
        engine: [
            times((word for one in each.segments for word in one.times or ()), "text")
            for each in those
        ]
        for engine, those in ours.items()
    }
    return {
        f"{THEIRS}, {name}": {
            engine: {
                **differing(said[name], [one.text for one in ours[engine]]),
                **near(timed[name], found_in_ours[engine]),
            }
            for engine in ours
        }
        for name in said
    }


def times(words: Any, name: str = "word") -> Timed:
    """Return words, normalised, with their times."""
    return [(normalised(getattr(one, name)), one.start, one.end) for one in words]


def differing(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """Return the number of their words, and the share that differs: errors, theirs being right."""
    pairs = [[normalised(text) or "-" for text in those] for those in (theirs, ours)]
    return {"of": sum(len(text.split()) for text in pairs[0]), "words": jiwer.wer(*pairs)}


def near(theirs: Sequence[Timed], ours: Sequence[Timed]) -> dict[str, Any]:
    """Return the number of words that both have, and the share whose both times are near."""
    shared = [
        (one[block.a + place], other[block.b + place])
        for one, other in zip(theirs, ours, strict=True)
        for block in SequenceMatcher(
            None, [word for word, *_ in one], [word for word, *_ in other], autojunk=False
        ).get_matching_blocks()
        for place in range(block.size)
    ]
    apart = [max(abs(a[1] - b[1]), abs(a[2] - b[2])) for a, b in shared]
    count = sum(bool(one <= NEAR + 1e-6) for one in apart)  # times are rounded to hundredths
    return {"shared": len(shared), "near": count / len(shared) if shared else 0.0}


def given(arguments: Any) -> dict[str, Any]:
    """Return the options of `transcribe` that all ways share."""
    return {"base": arguments.base, "language": arguments.language, "device": "cpu"}


def of(base: str) -> Which:
    """Return a base alone."""
    return Which(None, base, None, False, None, "scale", None)


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


if __name__ == "__main__":
    main()
