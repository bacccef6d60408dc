"""One Optuna study, worked on by any number of processes, any of which may die at any moment.

Every trial has a number, a folder `trial-N` for its fit, and for as long as a process is at it a
lock on `trial-N.lock`, which the kernel gives back when that process ends, however it ends. So a
trial that is running by the study's account, while nobody holds its lock, is dead: its parameters
go back into the queue, and whoever takes them goes on with its fit.
"""

import fcntl
import json
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from blora_pyro.errors import UserError
from blora_pyro.sweeps.storages import begin_study, join_database, kind_of, reason

JOURNAL, LOCK = "study.log", "study.lock"
METRICS = ("new-domain error", "backward error")
FOLDER, RETRIED, FAILURE = "folder", "retry_of", "failure"  # attributes of a trial

Objective = Callable[[Trial, Path], Sequence[float]]


class FileLock:
    """An exclusive lock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Nothing is locked yet.

        Args:
            path: Made when it is locked.
        """
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; False if someone has it and `wait` is off."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self._descriptor = descriptor
        except BlockingIOError:
            return False
        finally:
            if self._descriptor != descriptor:  # a signal may have come in
                os.close(descriptor)
        return True

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class SharedStudy:
    """A study of two errors, and the folder of its fits.

    Attributes:
        study: Optuna's.
        folder: Where the journal, the fits and their locks are.
    """

    def __init__(self, folder: Path, storage: str | None, name: str | None, seed: int) -> None:
        """Begin a study, or join it.

        Args:
            folder: Its folder, of one study alone.
            storage: URL of a database; None is the journal file in `folder`.
            name: In the storage; None is the folder's.
            seed: Of the sampler.

        Raises:
            UserError: If the folder holds something else, or the storage can't be opened.
        """
        self.folder, self._storage, self._seed = folder, storage, seed
        self._lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = {path.name for path in folder.iterdir()}
            if held and LOCK not in held:
                raise UserError(f"output '{folder}' holds something, but no sweep; give another")
            self._lock.acquire()
        except OSError as error:
            why = error.strerror
            raise UserError(f"output '{folder}' can't be written ({why}); give another") from None
        try:
            self._join(name or folder.resolve().name)
        finally:
            self._lock.release()

    def _join(self, name: str) -> None:
        """Open the study, which must be the one whose fits are in the folder, if any are."""
        mine = f"study '{name}' in {self._kind}"
        known = self._lock.path.read_text(encoding="utf-8")
        if known not in ("", mine):
            raise UserError(
                f"output '{self.folder}' is of {known}, not of {mine}; give the same storage and "
                "study name, or another output"
            )
        self.study = self._open(name)
        self._lock.path.write_text(mine, encoding="utf-8")

    @property
    def _kind(self) -> str:
        return JOURNAL if self._storage is None else kind_of(self._storage)

    def _open(self, name: str) -> optuna.Study:
        if self._storage is not None:
            return join_database(self._storage, name, METRICS)[0]
        path = str((self.folder / JOURNAL).resolve())
        try:
            journal = JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
            return begin_study(journal, name, METRICS)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file leads to
            raise UserError(
                f"{self.folder / JOURNAL} is damaged ({reason(error)}); bring back a copy, or "
                "start another sweep in another output"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In here no other process with this folder begins a trial."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def settle(self, options: Mapping[str, Any]) -> None:
        """Keep the options that the study is begun with, or check that they are those.

        Raises:
            UserError: If one is another.
        """
        wanted = json.loads(json.dumps(options))
        with self.locked():
            begun = self.trials()  # before the options, which another machine sets before a trial
            known = self.study.user_attrs.get("options")
            if known is None and begun:
                raise UserError(
                    f"study '{self.study.study_name}' is of something else; give another study name"
                )
            if known is None:
                self.study.set_user_attr("options", wanted)
                return
        for name in {**known, **wanted}:
            if known.get(name) != wanted.get(name):
                raise UserError(
                    f"the sweep in {self.folder} has {name} = {known.get(name)}, not "
                    f"{wanted.get(name)}; give the same, or start another sweep in another output"
                )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, or all."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def finished(self) -> list[FrozenTrial]:
        """The trials with an outcome: two errors, or a fit that diverged."""
        ended = self.trials(TrialState.COMPLETE, TrialState.FAIL)
        return [one for one in ended if one.values or FAILURE in one.user_attrs]

    def run_next(self, objective: Objective, total: int) -> bool:
        """Run one trial, unless `total` are finished or running.

        Args:
            objective: Is given the trial and the folder for its fit, and returns the two errors. A
                FloatingPointError is an outcome; anything else that it raises is no fault of the
                parameters, which go back into the queue.
            total: Of the study, whoever ran them.

        Returns:
            Whether there was one to run.
        """
        mine: list[FileLock] = []

        def begun(trial: Trial) -> Sequence[float]:
            mine.append(self._lock_of(trial.number))
            mine[0].acquire()
            self._lock.release()  # the trial is taken; others may come
            if self._outrun(trial, total):
                raise optuna.TrialPruned  # which is no outcome
            try:
                return objective(trial, self.folder / folder_of(trial))
            except FloatingPointError as error:
                trial.set_user_attr(FAILURE, str(error))
                raise

        try:
            with self.locked():
                self._requeue_dead()
                running = self.trials(TrialState.RUNNING)
                if len(self.finished()) + len(running) >= total:
                    return False
                self.study.sampler = optuna.samplers.TPESampler(seed=self._next_seed())
                self.study.optimize(begun, n_trials=1, catch=(FloatingPointError,))
        finally:
            for lock in mine:
                lock.path.unlink(missing_ok=True)
                lock.release()
        return True

    def _outrun(self, trial: Trial, total: int) -> bool:
        """Whether another machine, which `locked` does not keep out, was first with this trial.

        The database numbers trials in the order in which they come in, so that of two machines
        that retry the same dead one, or begin the last one, exactly one goes on.
        """
        before = [one for one in self.trials() if one.number < trial.number]
        if (lost := trial.user_attrs.get(RETRIED)) is not None:
            return any(one.user_attrs.get(RETRIED) == lost for one in before)
        taken = {one.number for one in self.finished()}
        taken |= {one.number for one in before if one.state == TrialState.RUNNING}
        return len(taken) >= total

    def _next_seed(self) -> int:
        """Of the next trial's parameters: no two trials share it, whoever runs them.

        It hangs on how many were begun before, and with a database on the place, too: there
        `locked` does not keep other folders out.
        """
        begun = sum(one.state != TrialState.WAITING for one in self.trials())
        place = f"{socket.gethostname()} {self.folder.resolve()}" if self._storage else ""
        entropy = [self._seed, begun, zlib.crc32(place.encode())]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _lock_of(self, number: int) -> FileLock:
        return FileLock(self.folder / f"trial-{number}.lock")

    def _holder(self, number: int) -> bool | None:
        """Whether a process is at a trial; None if none with this folder ever was or is done."""
        lock = self._lock_of(number)
        if not lock.path.exists():
            return None
        free = lock.acquire(wait=False)
        lock.release()
        return not free

    def _requeue_dead(self) -> None:
        """Put the parameters of trials that ended without an outcome back, once each.

        A trial that is run with another folder, which needs a database, is dead where its heartbeat
        is missed.
        """
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.trials(TrialState.RUNNING):
            holder = self._holder(trial.number)
            if holder is False or (holder is None and self._storage is None):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        everything = self.trials()
        again = {one.user_attrs.get(RETRIED) for one in everything}
        for trial in everything:
            ended = trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs
            if ended and trial.number not in again and not self._holder(trial.number):
                about = {RETRIED: trial.number, FOLDER: folder_of(trial)}
                self.study.enqueue_trial(trial.params, user_attrs=about)
                self._lock_of(trial.number).path.unlink(missing_ok=True)


def folder_of(trial: FrozenTrial | Trial) -> str:
    """Name of the folder of a trial's fit, which may be that of a dead one that it goes on with."""
    return trial.user_attrs.get(FOLDER, f"trial-{trial.number}")
