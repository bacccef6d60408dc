"""Rows that machines without a common folder share, through an Optuna study in a database.

A row is a finished trial, its value the balanced error; a lock is a running one with heartbeats,
which ends when it misses them (see `storages`). Files in the output are what tables are made of:
rows of the database are written there, and those that only the output has are put into it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial

from blora_pyro.comparison.rows import FORMAT, Row, RowStore, read_row
from blora_pyro.errors import UserError
from blora_pyro.sweeps.storages import beating, join_database, kind_of, reason

METRICS = ("balanced error",)
LOCK, KEY, CONTENT = "lock", "row", "content"  # attributes of a trial


class SharedRows(RowStore):
    """The rows of one output folder and of a database, and locks that all machines see."""

    def __init__(self, output: Path, storage: str, name: str | None) -> None:
        """Begin the study, or join it.

        Args:
            output: Folder of the comparison on this machine.
            storage: URL of the database.
            name: Of the study; None is the folder's.

        Raises:
            UserError: If the database can't be opened, or the study is something else.
        """
        super().__init__(output)
        self.study, self._storage = join_database(storage, name or output.resolve().name, METRICS)
        self._id = self._storage.get_study_id_from_name(self.study.study_name)
        self._kind = kind_of(storage)
        self._shared: dict[str, Mapping[str, Any]] = {}  # content of rows that are in the database
        self._claim: int | None = None  # id of the trial that is this process's lock
        self._seen: set[int] = set()  # ids of other processes' locks

    def refresh(self) -> None:
        """Look for rows of other machines. Of equal keys, the row of the first trial counts.

        Raises:
            UserError: If the database is away.
        """
        with self._reached():
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                key = trial.user_attrs.get(KEY)
                if key is not None and key not in self._shared:
                    with suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged
                        read_row(trial.user_attrs[CONTENT])
                        self._shared[key] = trial.user_attrs[CONTENT]

    def get(self, key: str) -> Row | None:
        """The row of a key, of the database as of the last `refresh`, or of a file."""
        if key not in self._known:
            if key in self._shared:
                super().put(key, self._shared[key])
            elif super().get(key):
                self._share(key, self._read(key))
        return super().get(key)

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Write a row, here first; if another machine made it meanwhile, its row counts.

        Raises:
            UserError: If it can't be written, or the database is away.
        """
        super().put(key, content)
        self.refresh()
        if key in self._shared:
            super().put(key, self._shared[key])
        else:
            self._share(key, {"format": FORMAT, **content})

    def _share(self, key: str, content: Mapping[str, Any]) -> None:
        """Finish the claimed trial with a row, or a trial of its own where the claim is lost."""
        about = {KEY: key, CONTENT: content}
        value = read_row(content).balanced_error
        with self._reached():
            try:
                if self._claim is None:
                    raise UpdateFinishedTrialError
                for name, one in about.items():
                    self._storage.set_trial_user_attr(self._claim, name, one)
                self._storage.set_trial_state_values(self._claim, TrialState.COMPLETE, [value])
            except UpdateFinishedTrialError:  # this process was slow, and taken for dead
                whole = create_trial(value=value, user_attrs=about)
                self._storage.create_new_trial(self._id, whole)
            self._shared[key] = content

    @contextmanager
    def locked(self, key: str) -> Iterator[bool]:
        """Whether this process has the lock `key` inside the `with`; another machine may have it.

        Raises:
            UserError: If the lock's file can't be made, or the database is away.
        """
        with super().locked(key) as mine:
            self._claim = self._claimed(key) if mine else None
            if self._claim is None:
                yield False
                return
            try:
                with beating(self._storage, self._claim):
                    self.refresh()
                    yield True
            finally:
                with suppress(Exception):  # it is a row; or else missed heartbeats end it
                    self._storage.set_trial_state_values(self._claim, TrialState.FAIL)
                self._claim = None

    def _claimed(self, key: str) -> int | None:
        """Id of a new trial that is the lock `key`; None if another one is.

        The database numbers trials in the order in which they come in: of machines that claim a
        lock at once, the first one sees no other before it, and all others see it.
        """
        with self._reached():
            optuna.storages.fail_stale_trials(self.study)
            if self._claims(key):
                return None
            claim = create_trial(state=TrialState.RUNNING, user_attrs={LOCK: key})
            mine = self._storage.create_new_trial(self._id, claim)
            self._storage.record_heartbeat(mine)
            if min(self._claims(key), default=None) == mine:
                return mine
            self._storage.set_trial_state_values(mine, TrialState.FAIL)
            return None

    def _claims(self, key: str) -> list[int]:
        """Ids of the living locks `key`.

        Whose process died before its first heartbeat would never miss one: each gets one from here.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ids = [one._trial_id for one in running if one.user_attrs.get(LOCK) == key]
        for new in {*ids} - self._seen:
            self._storage.record_heartbeat(new)
            self._seen.add(new)
        return ids

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever a database and its driver raise
            raise UserError(
                f"storage '{self._kind}' is away ({reason(error)}); rows are safe in "
                f"{self.rows.parent}: start the same command again when it is back"
            ) from None
