"""The queue of a study: Optuna's trials in a database, shared by processes that may die.

Optuna hands each waiting trial to one process, records a heartbeat while that process works on it,
and ends a trial whose heartbeat is missed. Nothing else is shared: no locks, and no claims but the
order of the trials in the database, which is the same for all.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Engine, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from blora_pyro.errors import UserError, reason

DATABASE = "study.db"  # in the output of a study
RUN_FOLDER = "run"  # attribute of a trial: name of its run folder
SECONDS = 10  # between heartbeats with a file in the output, and with a database
SECONDS_SHARED = 60
MISSED = 3  # heartbeats; who misses them is dead
PATIENCE = 1.0  # seconds until other processes' trials are looked at again
OPEN = (TrialState.WAITING, TrialState.RUNNING)
AWAY = (StorageInternalError, SQLAlchemyError)  # what Optuna raises where the database is away

Objective = Callable[[Trial], float | Sequence[float]]


class _Storage(RDBStorage):
    """A database that may be away for a while: a heartbeat that fails is not the last one."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat, if the database is there."""
        with suppress(*AWAY):
            super().record_heartbeat(trial_id)


def _lock_before_reading(engine: Engine) -> None:
    """Have SQLite begin every transaction as the only one.

    Optuna reads a trial's state and then sets it, under a row lock that SQLite does not have: two
    processes that read at once would both begin the trial.
    """
    engine.dispose()  # connections that were opened otherwise
    event.listen(engine, "connect", lambda connection, _: _begin_by_hand(connection))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _begin_by_hand(connection: Any) -> None:
    connection.isolation_level = None  # otherwise the driver begins, at the first write


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's log, and its warnings that something is experimental, out of the terminal."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.CRITICAL)  # an error is also raised
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


class Trials:
    """The trials of one study, as a context that is left when the work is done.

    If the database cannot be reached, the context ends in one line that says so.

    Attributes:
        study: Optuna's.
        output: Folder of the study.
    """

    def __init__(
        self,
        output: Path,
        metrics: Sequence[str],
        *,
        storage: str | None = None,
        name: str | None = None,
        heartbeat: int | None = None,
    ) -> None:
        """Begin the study, or join it.

        Args:
            output: Folder of the study, which holds the database if no storage is given.
            metrics: What is minimised.
            storage: URL of a database; None is the file `study.db` in the output.
            name: Of the study in the database; None is the output's name.
            heartbeat: Seconds between two heartbeats; who misses three is taken for dead. None is
                10, and 60 with a storage.

        Raises:
            UserError: If the database can't be opened, or the study of that name is another.
        """
        self.output, self._kind = output, (storage or DATABASE).partition("://")[0]
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / ".blora-pyro").touch()
            (output / ".blora-pyro").unlink(missing_ok=True)
        except OSError as error:
            why = error.strerror
            raise UserError(f"output '{output}' can't be written ({why}); give another") from None
        url = storage or f"sqlite:///{(output / DATABASE).resolve()}"
        seconds = heartbeat or (SECONDS if storage is None else SECONDS_SHARED)
        self._grace, self._seen = MISSED * seconds, dict[int, float]()
        self._storage = self._open(url, seconds)
        self.study = self._begin(name or output.resolve().name, metrics)

    def _open(self, url: str, heartbeat: int) -> RDBStorage:
        is_sqlite = url.startswith("sqlite")
        engine: dict[str, Any] = {"pool_pre_ping": True}  # a fit may outlast a connection
        if is_sqlite:
            engine = {"connect_args": {"timeout": 60}}  # seconds that a writer waits for another
        tries = 10
        while True:
            try:
                storage = _Storage(
                    url,
                    engine,
                    heartbeat_interval=heartbeat,
                    grace_period=MISSED * heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
                if is_sqlite:
                    _lock_before_reading(storage.engine)
                return storage
            except Exception as error:  # whatever a database and its driver raise
                tries -= 1
                raced = isinstance(error, IntegrityError) or "already exists" in str(error)
                if raced and tries:  # another process makes the tables at this moment
                    time.sleep(0.5)
                    continue
                raise self._unusable(error) from None

    def _begin(self, name: str, metrics: Sequence[str]) -> optuna.Study:
        try:
            study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=["minimize"] * len(metrics),
                load_if_exists=True,
            )
            if len(study.directions) == len(metrics) and not study.metric_names:
                study.set_metric_names([*metrics])
            names = study.metric_names
        except Exception as error:
            raise self._unusable(error) from None
        if names != [*metrics]:
            raise UserError(f"study '{name}' is of something else; give another study name")
        return study

    def _unusable(self, error: Exception) -> UserError:
        if isinstance(error, ImportError) and self._kind.endswith("psycopg"):
            return UserError(
                f"storage '{self._kind}' needs psycopg, which is not installed; pip install "
                "'blora-pyro[studies,postgresql]'"
            )
        why = reason(error.__cause__ or error)
        return UserError(
            f"storage '{self._kind}' can't be opened ({why}); give sqlite:///FILE or "
            "postgresql+psycopg://..., or leave it out for a file in the output"
        )

    def __enter__(self) -> "Trials":
        """Return the trials."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the connections to the database.

        Raises:
            UserError: If the database is away; that may surface as another error of Optuna's.
        """
        with suppress(*AWAY):
            self._storage.remove_session()
            self._storage.engine.dispose()
        is_told = isinstance(error, UserError) or not isinstance(error, Exception)
        cause = None if is_told else error
        while cause is not None and not isinstance(cause, AWAY):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise UserError(
                f"storage '{self._kind}' can't be reached ({reason(cause.__cause__ or cause)}); no "
                "trial is lost, and every fit is safe in the output: start the same command again "
                "when it is back"
            ) from None

    def of(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states, or all."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def end_stale(self) -> None:
        """End the trials whose heartbeat is missed; each waits again, with what it was given."""
        optuna.storages.fail_stale_trials(self.study)
        now = time.monotonic()
        for trial in self.of(TrialState.RUNNING):
            seen = self._seen.setdefault(trial.number, now)
            if now - seen > self._grace:  # its process may have died before its first heartbeat
                self._seen[trial.number] = math.inf
                self._storage.record_heartbeat(trial._trial_id)

    def open_runs(self) -> set[str]:
        """Return the run folders of the trials that wait or are worked on."""
        return {
            one.user_attrs[RUN_FOLDER] for one in self.of(*OPEN) if RUN_FOLDER in one.user_attrs
        }

    def is_first(self, trial: Trial) -> bool:
        """Return whether no earlier trial that waits or is worked on has the same run folder.

        All processes see the same order, so of two that want a fit at once one has it.
        """
        run = trial.user_attrs.get(RUN_FOLDER)
        earlier = (one for one in self.of(*OPEN) if one.number < trial.number)
        return all(one.user_attrs.get(RUN_FOLDER) != run for one in earlier)

    def run_next(self, objective: Objective, about: Mapping[str, Any] | None = None) -> None:
        """Work on the next trial: one that waits, or else a new one.

        A trial whose objective raises `optuna.TrialPruned` has no outcome. A FloatingPointError is
        an outcome; after anything else that is raised the trial waits again.

        Args:
            objective: Called with the trial.
            about: Attributes of a trial that is to wait from now on; None enqueues none.
        """

        def attempt(trial: Trial) -> float | Sequence[float]:
            try:
                return objective(trial)
            except (FloatingPointError, optuna.TrialPruned):
                raise
            except UpdateFinishedTrialError:  # this process was slow, and taken for dead
                raise optuna.TrialPruned from None
            except BaseException:
                with suppress(*AWAY):
                    if RUN_FOLDER in trial.user_attrs:
                        self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
                raise

        if about is not None:
            self.study.enqueue_trial({}, user_attrs=dict(about))
        try:
            self.study.optimize(attempt, n_trials=1, catch=(FloatingPointError,))
        except UpdateFinishedTrialError:  # it was taken for dead meanwhile
            return
        except ValueError as error:
            if "Cannot tell a" not in str(error):  # likewise
                raise

    def wait(self) -> None:
        """Wait a moment for other processes, and end what is left of dead ones."""
        time.sleep(PATIENCE)
        self.end_stale()
