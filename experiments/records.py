"""What every result says of its origin: command, commit and machine; and who prints notes."""

import shlex
import sys
from pathlib import Path

import torch

from blora_pyro.runs.listeners import Listener
from blora_pyro.studies.base_fits import commit, machine

ROOT = Path(__file__).resolve().parents[1]


class Notes(Listener):
    """Prints the notes of a fit."""

    def note(self, text: str) -> None:
        """Print one."""
        print(text, flush=True)


def origin() -> dict[str, str]:
    """Return the command, the commit and the machine of this process, as texts."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    command = shlex.join(["python", str(name), *sys.argv[1:]])
    return {"command": command, "commit": commit(), "machine": machine(torch.device("cpu"))}
