"""The harness of all benchmarks: interleaved repeats, medians, ratios to a peer, results as data.

A benchmark measures cases by name. `Results` keeps each case as soon as it is measured in a JSON
file, with the command, the commit and the machine, so that a killed run continues. In a case,
contestants take turns in one process (`race`); figures are medians and quartiles of the seconds,
and of the ratio to the peer's seconds in the same round.
"""

import argparse
import json
import os
import platform
import random
import shlex
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


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    output = RESULTS / f"{Path(sys.argv[0]).stem}.json"
    found.add_argument("--threads", type=int, default=1, help="of torch")
    found.add_argument("--quick", action="store_true", help="smallest case, no results kept")
    found.add_argument("--fresh", action="store_true", help="measure again what is there")
    found.add_argument("--output", type=Path, default=output, help="JSON file")
    return found


def parse(found: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line, and set torch's threads."""
    arguments = found.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


class Results:
    """Cases by name, in a JSON file that is written after each one.

    A case in the file is not measured again if code, machine and settings are the same.
    """

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        """Read what is there.

        Args:
            arguments: Of `parse`.
            **settings: What else results depend on.
        """
        self.path: Path | None = None if arguments.quick else arguments.output
        script = Path(sys.argv[0]).name
        self.about = {
            "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
            "commit": commit(),
            "machine": machine(arguments.threads),
            "settings": json.loads(json.dumps(settings)),
        }
        self.cases: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        if self.path and self.path.is_file() and not arguments.fresh:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(stored.get(n) == self.about[n] for n in ("commit", "machine", "settings"))
            if same and not self.about["commit"].endswith("dirty"):
                self.cases = stored["cases"]

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the case of this name, measured unless it is there."""
        if name not in self.cases:
            self.cases[name] = rounded(measure())
            self.write()
        return self.cases[name]

    def write(self, **summary: Any) -> None:
        """Write what there is, with further figures of all cases together."""
        self.summary |= rounded(summary)
        if self.path is None:
            return
        report = {**self.about, **self.summary, "cases": self.cases}
        fresh = self.path.with_suffix(".new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


def commit() -> str:
    """Return the last commit that changed what is measured, or how; marked if files differ."""
    scripts = ("common.py", "contestants.py", Path(sys.argv[0]).name)
    code = ["blora_pyro", *(f"benchmarks/{name}" for name in scripts)]
    last = _git("log", "-1", "--format=%h", "--", *code)
    return f"{last}-dirty" if _git("status", "--porcelain", "--", *code) or not last else last


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    return done.stdout.strip()


def machine(threads: int) -> dict[str, Any]:
    """Return what figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "threads": threads, "torch": torch.__version__}


# ---- time


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    inside: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Return the seconds of every call, (rounds,) for each contestant.

    All are called in every round, in an order that is drawn anew, so that whatever else the machine
    does, and what one leaves in the caches for the next, falls on all of them alike.

    Args:
        contestants: Name -> what is called.
        rounds: Number of rounds that count.
        warm_up: Number of rounds before, that do not.
        inside: Name -> what a call is made in; its entry and exit are not timed.
    """
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name in rng.sample(list(contestants), len(contestants)):
            with inside(name):
                started = time.perf_counter()
                contestants[name]()
                passed = time.perf_counter() - started
            if number >= 0:
                seconds[name].append(passed)
    return seconds


def compared(seconds: Mapping[str, Sequence[float]], peer: str) -> dict[str, dict[str, Any]]:
    """Return median and quartiles of the seconds, and of the ratio to the peer's."""
    return {
        name: {
            "seconds": spread(own),
            "ratio": spread([a / b for a, b in zip(own, seconds[peer], strict=True)]),
        }
        for name, own in seconds.items()
    }


def race(
    contestants: Mapping[str, Callable[[], object]], peer: str, rounds: int, **options: Any
) -> dict[str, dict[str, Any]]:
    """Return what contestants take, `compared` with the peer; options of `interleaved`."""
    return compared(interleaved(contestants, rounds, **options), peer)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    )
    return {"median": middle, "low": low, "high": high}


# ---- shown


def shown(found: Mapping[str, float], form: str = ".2f", unit: float = 1.0) -> str:
    """Return `median [quartiles]`."""
    median, low, high = (format(found[name] * unit, form) for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def rounded(value: Any) -> Any:
    """Return the same with four significant digits in every float."""
    if isinstance(value, Mapping):
        return {str(name): rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()
