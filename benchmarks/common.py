"""What benchmarks of time and memory share: interleaved timing, and results kept as data."""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DIGITS = 4


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; the results' file is named after the script."""
    script = Path(sys.argv[0]).stem
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--threads", type=int, default=1, help="of torch")
    found.add_argument("--quick", action="store_true", help="smallest case, kept nowhere")
    found.add_argument("--fresh", action="store_true", help="measure anew what is there already")
    found.add_argument("--output", type=Path, default=RESULTS / f"{script}.json", help="JSON file")
    return found


def parse(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line; torch has its threads from then on."""
    arguments = found.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


class Results:
    """Cases by name, in a JSON file that is written after every one.

    A case that is in the file already is taken from it, if code, machine and threads are the same:
    so a killed run goes on where it was.
    """

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        """Read what is there.

        Args:
            arguments: Of `parse`.
            **settings: Whatever else results depend on.
        """
        self.path: Path | None = None if arguments.quick else arguments.output
        self.about = {**about(arguments.threads), "settings": json.loads(json.dumps(settings))}
        self.cases: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        if self.path and self.path.is_file() and not arguments.fresh:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(stored[one] == self.about[one] for one in ("commit", "machine", "settings"))
            if same and not self.about["commit"].endswith("dirty"):
                self.cases = stored["cases"]

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The case of this name, measured unless it is there, and kept."""
        if name not in self.cases:
            self.cases[name] = rounded(measure())
            self.write()
        return self.cases[name]

    def write(self, **summary: Any) -> None:
        """Write what there is so far, with further figures of all cases together."""
        self.summary |= rounded(summary)
        if self.path is None:
            return
        report = {**self.about, **self.summary, "cases": self.cases}
        fresh = self.path.with_suffix(".new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


def about(threads: int) -> dict[str, Any]:
    """Where figures are from."""
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return {"command": " ".join(command), "commit": commit(), "machine": machine(threads)}


def commit() -> str:
    """The last commit that changed what is measured, or how."""
    scripts = ("common.py", "contestants.py", Path(sys.argv[0]).name)
    code = ["blora_pyro", *(f"benchmarks/{name}" for name in scripts)]
    last = _output("git", "log", "-1", "--format=%h", "--", *code)
    changed = _output("git", "status", "--porcelain", "--", *code)
    return f"{last}-dirty" if changed or not last else last


def machine(threads: int) -> dict[str, Any]:
    """What figures depend on besides the code."""
    return {"processor": _processor(), "threads": threads, "torch": torch.__version__}


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    around: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds of every call, (rounds,) a contestant.

    All are called in every round, in an order that is drawn anew, so that whatever else the machine
    does, and what one leaves in the caches for the next, falls on all of them alike.

    Args:
        contestants: Name -> what is called.
        rounds: That count.
        warm_up: Rounds before, that do not.
        around: Name -> what a call is made in, its entry and exit not timed.
    """
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name in rng.sample(list(contestants), len(contestants)):
            with around(name):
                started = time.perf_counter()
                contestants[name]()
                passed = time.perf_counter() - started
            if number >= 0:
                seconds[name].append(passed)
    return seconds


def compared(seconds: Mapping[str, Sequence[float]], peer: str) -> dict[str, dict[str, Any]]:
    """Median and quartiles of the seconds, and of the ratio to the peer's in the same round."""
    return {
        name: {
            "seconds": spread(own),
            "ratio": spread([a / b for a, b in zip(own, seconds[peer], strict=True)]),
        }
        for name, own in seconds.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    )
    return {"median": middle, "low": low, "high": high}


def shown(found: Mapping[str, float], form: str = ".2f", unit: float = 1.0) -> str:
    """`median [quartiles]`."""
    median, low, high = (format(found[name] * unit, form) for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float."""
    if isinstance(value, Mapping):
        return {str(name): rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown."""
    print(f"\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
