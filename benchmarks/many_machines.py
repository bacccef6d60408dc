"""Workers of one sweep and of one comparison, with nothing but a database in common; one is killed.

Every worker has an output of its own, as on a machine of its own. In the middle of a fit the first
one of each team gets SIGKILL. What is then checked in the database: as many trials are finished as
were asked for, none was done twice, and the dead worker's was taken over; and that all workers say
the same in the end, the dead one included, which is started again. It takes some ten minutes, of
which a dead worker is missed for three.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from common import RESULTS, commit, machine
from optuna.trial import FrozenTrial, TrialState

from blora_pyro.data import load_split
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.studies.results import ScoredFit
from blora_pyro.studies.trials import quiet_optuna

TRIALS = 8  # of the sweep
SEEDS = "0,1,2"  # of the comparison
ROWS = {"train": 20, "dev": 6, "test": 6}  # utterances of a set
STEPS = 40  # of a fit


def main() -> None:
    """Start the workers, kill two of them, check, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--storage", help="URL of a database (default: an sqlite file)")
    parser.add_argument("--workers", type=int, default=3, help="of each team")
    parser.add_argument("--folder", type=Path, default=Path("runs/many_machines"), help="made anew")
    parser.add_argument("--output", type=Path, default=RESULTS / "many_machines.json")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    folder = arguments.folder.resolve()
    domain, backward = (small_set(folder / "sets", name) for name in ("de-en", "de"))
    storage = arguments.storage or f"sqlite:///{folder}/study.db"
    steps = str(STEPS)
    sweep = ["sweep", "--data", domain, "--trials", str(TRIALS), "--steps", steps]
    compare = ["compare", "--methods", "lora", "--domains", f"de-en={domain}", "--seeds", SEEDS]
    compare += ["--settings", f"allx{steps}", "--threads", "1"]
    teams = [
        SweepTeam(folder, [*sweep, "--backward", f"de={backward}"], storage, arguments.workers),
        CompareTeam(folder, [*compare, "--backward", f"de={backward}"], storage, arguments.workers),
    ]
    with quiet_optuna():
        while not all([team.ended() for team in teams]):
            time.sleep(0.2)
        found = {team.command[0]: team.checked() for team in teams}
    command = f"python benchmarks/many_machines.py --storage {storage.partition('://')[0]}://..."
    report = {"command": command, "commit": commit(), "machine": machine(1)}
    database = teams[0].database()
    text = json.dumps({**report, "database": database, **found}, indent=1)
    print(text)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    if not all(one for team in found.values() for one in team["checks"].values()):
        sys.exit("a check failed")


def small_set(folder: Path, name: str) -> str:
    """The first utterances of a built-in corpus, as a folder with a parquet file a split."""
    (folder / name).mkdir(parents=True)
    for split, count in ROWS.items():
        rows = load_split(name, split).select(range(count))
        rows.to_parquet(str(folder / name / f"{split}.parquet"))
    return str(folder / name)


class Team:
    """Workers at one study, the first of which is killed in the middle of a fit, and comes again.

    Attributes:
        command: Of all workers, but for their outputs.
    """

    fits: str  # where a worker has its fits, as a pattern

    def __init__(self, folder: Path, command: list[str], storage: str, workers: int) -> None:
        """Start them."""
        self.command, self.storage = command, storage
        self.folder = folder / command[0]
        self.name = f"{command[0]}-{time.time_ns()}"
        self.killed: str | None = None  # the fit in whose middle it was
        self.killed_at = 0.0
        self.workers = [self._start(number) for number in range(workers)]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        output = self.folder / str(number)
        output.parent.mkdir(parents=True, exist_ok=True)
        study = ["--storage", self.storage, "--study-name", self.name]
        command = [sys.executable, "-m", "blora_pyro", *self.command, *study, "--json"]
        with (
            output.with_suffix(".out").open("wb") as out,
            output.with_suffix(".err").open("wb") as err,
        ):
            return subprocess.Popen(
                [*command, "--output", str(output)],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ended(self) -> bool:
        """Whether all workers have; kills the first one when its time has come."""
        if self.killed is None:
            now = time.time()
            unfinished = [
                run.parent
                for run in self.folder.glob(f"{self.fits}/run.json")
                if state_of(run.parent) != FINISHED and now - run.stat().st_mtime > 1
            ]
            if unfinished:
                self.workers[0].kill()
                self.workers[0].wait()
                self.killed, self.killed_at = unfinished[0].name, time.time()
        return all(worker.poll() is not None for worker in self.workers)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Of the study, from the database."""
        return optuna.load_study(study_name=self.name, storage=self.storage).get_trials(
            states=states or None
        )

    def database(self) -> str:
        """Its name and version."""
        storage = optuna.storages.RDBStorage(self.storage)
        dialect = storage.engine.dialect
        storage.engine.connect().close()
        return f"{dialect.name} {'.'.join(map(str, dialect.server_version_info or ()))}"

    def checked(self) -> dict[str, Any]:
        """What came of it."""
        again = self._start(0)
        codes = [again.wait(), *(worker.returncode for worker in self.workers[1:])]
        outputs = [
            json.loads(one.read_bytes() or b"null") for one in sorted(self.folder.glob("*.out"))
        ]
        what = self.what()
        count = len(what)
        taken = self.taken_over()
        return {
            "workers": len(self.workers),
            "finished": count,
            "fits_of_workers": [
                len([*self.folder.glob(self.fits.replace("0/", f"{number}/", 1))])
                for number in range(len(self.workers))
            ],
            "withdrawn": self.withdrawn(),
            "killed_in": self.killed,
            "seconds_until_taken_over": [
                round(one.datetime_start.timestamp() - self.killed_at)
                for one in taken
                if one.datetime_start
            ],
            "checks": {
                "a worker was killed in the middle of a fit": self.killed is not None,
                "the others ended well": codes == [0] * len(codes),
                "as many finished as were asked for": count == self.asked(outputs[0]),
                "none done twice": len({*what}) == count,
                "the killed worker's was taken over once": len(taken) == 1,
                "all workers say the same": all(one == outputs[0] for one in outputs),
            },
        }

    def asked(self, content: dict[str, Any]) -> int:
        """How many were to be finished, given what a worker says."""
        raise NotImplementedError

    def what(self) -> Sequence[object]:
        """What every finished trial was."""
        raise NotImplementedError

    def taken_over(self) -> list[FrozenTrial]:
        """Finished trials of what was lost."""
        raise NotImplementedError

    def withdrawn(self) -> int:
        """Trials of workers that saw that another one was first."""
        raise NotImplementedError


class SweepTeam(Team):
    """Of `blora-pyro sweep`."""

    fits = "0/trial-*[0-9]"

    def asked(self, content: dict[str, Any]) -> int:
        """Those of the command."""
        return TRIALS if len(content["trials"]) == TRIALS else -1

    def what(self) -> Sequence[object]:
        """Parameters."""
        return [tuple(one.params.values()) for one in self.trials(TrialState.COMPLETE)]

    def taken_over(self) -> list[FrozenTrial]:
        """Of the killed one's parameters."""
        number = int(str(self.killed).partition("-")[2])
        lost = next(one for one in self.trials() if one.number == number)
        finished = self.trials(TrialState.COMPLETE)
        return [one for one in finished if one.params == lost.params and one.number > number]

    def withdrawn(self) -> int:
        """See `studies`."""
        return len(self.trials(TrialState.PRUNED))


class CompareTeam(Team):
    """Of `blora-pyro compare`."""

    fits = "0/fits/*"

    def asked(self, content: dict[str, Any]) -> int:
        """The rows of the table."""
        return content["rows"]["made"] if not content["rows"]["missing"] else -1

    def what(self) -> Sequence[object]:
        """Names of the rows."""
        trials = self.trials(TrialState.COMPLETE)
        return [ScoredFit.from_row(row).key for one in trials for row in one.user_attrs["scores"]]

    def taken_over(self) -> list[FrozenTrial]:
        """The killed one's fit."""
        trials = [one for one in self.trials() if one.user_attrs.get("run") == self.killed]
        finished = [one for one in trials if one.state == TrialState.COMPLETE]
        return finished[:1] if trials[0].state == TrialState.FAIL else []

    def withdrawn(self) -> int:
        """See `studies`."""
        return len(self.trials(TrialState.PRUNED))


if __name__ == "__main__":
    main()
