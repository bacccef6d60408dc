"""Workers of a sweep and of a comparison, with nothing but a database in common; one is killed.

    python benchmarks/many_machines.py --storage postgresql+psycopg://USER@HOST/DATABASE

Each worker has an output of its own, as on a machine of its own. In the middle of a fit the first
one of each team gets SIGKILL, and is started again at the end. Checked: the others end well, no fit
was finished twice, the killed one's was taken over, and all workers report the same. It takes some
ten minutes, of which a dead worker is missed for three.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from common import Results, parse, parser
from optuna.trial import FrozenTrial, TrialState

from blora_pyro.data import load_split
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.studies.trials import RUN_FOLDER, quiet_optuna

TRIALS, SEEDS, STEPS = 8, "0,1,2", "40"  # of the sweep; of the comparison; of a fit
ROWS = {"train": 20, "dev": 6, "test": 6}  # utterances of a set


def main() -> None:
    """Start the workers, kill two of them, check, write JSON."""
    found = parser(__doc__)
    found.add_argument("--storage", help="URL of a database (default: an SQLite file)")
    found.add_argument("--workers", type=int, default=3, help="of each team")
    found.add_argument("--folder", type=Path, default=Path("runs/many_machines"), help="made anew")
    arguments = parse(found)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    folder = arguments.folder.resolve()
    domain, backward = (small_set(folder / "sets", name) for name in ("de-en", "de"))
    storage = arguments.storage or f"sqlite:///{folder}/study.db"
    sweep = ["sweep", "--data", domain, "--trials", str(TRIALS), "--steps", STEPS]
    compare = ["compare", "--methods", "lora", "--domains", f"de-en={domain}", "--seeds", SEEDS]
    compare += ["--settings", f"allx{STEPS}", "--threads", "1"]
    shared = ["--backward", f"de={backward}", "--storage", storage, "--json"]
    with quiet_optuna():
        teams = [Team(folder, [*one, *shared], storage) for one in (sweep, compare)]
        for team in teams:
            team.start(arguments.workers)
        while not all([team.ended() for team in teams]):
            time.sleep(0.2)
        kind = storage.partition("://")[0]
        results = Results(arguments, storage=kind, workers=arguments.workers)
        checks = [results.case(team.command[0], team.checked)["checks"] for team in teams]
    results.about["command"] = f"python benchmarks/many_machines.py --storage {kind}://..."
    results.write()
    print(json.dumps(results.cases, indent=1))
    if not all(one for found in checks for one in found.values()):
        sys.exit("a check failed")


def small_set(folder: Path, name: str) -> str:
    """Return a folder with the first utterances of a built-in corpus."""
    (folder / name).mkdir(parents=True)
    for split, count in ROWS.items():
        rows = load_split(name, split).select(range(count))
        rows.to_parquet(str(folder / name / f"{split}.parquet"))
    return str(folder / name)


class Team:
    """Workers on one study, the first of which is killed in the middle of a fit."""

    def __init__(self, folder: Path, command: list[str], storage: str) -> None:
        """Start nothing yet.

        Args:
            folder: For the outputs of all teams.
            command: Of all workers, without their outputs.
            storage: URL of the database.
        """
        self.command, self.storage, self.folder = command, storage, folder / command[0]
        self.name = f"{command[0]}-{time.time_ns()}"
        self.killed: str | None = None  # name of the run in whose middle it was
        self.killed_at = 0.0
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, count: int) -> None:
        """Start the workers."""
        self.folder.mkdir(parents=True)
        self.workers = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        output = self.folder / str(number)
        command = [sys.executable, "-m", "blora_pyro", *self.command, "--study-name", self.name]
        with (
            output.with_suffix(".out").open("wb") as out,
            output.with_suffix(".err").open("wb") as err,
        ):
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command += ["--output", str(output)]
            return subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def ended(self) -> bool:
        """Return whether all workers have ended; kill the first one when its time has come."""
        if self.killed is None:
            for run in self.folder.glob("0/**/run.json"):
                age = time.time() - run.stat().st_mtime
                if state_of(run.parent) != FINISHED and age > 1 and self.killed is None:
                    self.workers[0].kill()
                    self.workers[0].wait()
                    self.killed, self.killed_at = run.parent.name, time.time()
        return all(worker.poll() is not None for worker in self.workers)

    def finished(self) -> list[FrozenTrial]:
        """Return the finished trials of the study."""
        study = optuna.load_study(study_name=self.name, storage=self.storage)
        return study.get_trials(states=[TrialState.COMPLETE])

    def checked(self) -> dict[str, Any]:
        """Start the killed worker again, and return what came of it."""
        again = self._start(0)
        codes = [again.wait(), *(worker.returncode for worker in self.workers[1:])]
        outputs = [
            json.loads(one.read_bytes() or b"0") for one in sorted(self.folder.glob("*.out"))
        ]
        runs = Counter(one.user_attrs.get(RUN_FOLDER) for one in self.finished())
        later = [
            one.datetime_complete.timestamp() - self.killed_at
            for one in self.finished()
            if one.user_attrs.get(RUN_FOLDER) == self.killed and one.datetime_complete
        ]
        return {
            "workers": len(self.workers),
            "finished": len(self.finished()),
            "seconds_until_taken_over": later,
            "checks": {
                "a worker was killed in the middle of a fit": self.killed is not None,
                "the others ended well": codes == [0] * len(codes),
                "none done twice": max(runs.values()) == 1,
                "the killed worker's was taken over once": len(later) == 1,
                "all workers say the same": all(one == outputs[0] for one in outputs),
            },
        }


if __name__ == "__main__":
    main()
