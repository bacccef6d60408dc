"""What every result says of its origin: command, commit and machine."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def origin() -> dict[str, str]:
    """Return the command, the commit and the machine of this process, as texts."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
        "commit": commit(str(name)),
        "machine": f"{_processor()}, threads {torch.get_num_threads()}, torch {torch.__version__}",
    }


def commit(script: str) -> str:
    """Return the last commit that changed the package or a script, marked if either differs."""
    code = ["blora_pyro", script]
    last = _git("log", "-1", "--format=%h", "--", *code)
    return f"{last}-dirty" if _git("status", "--porcelain", "--", *code) or not last else last


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
