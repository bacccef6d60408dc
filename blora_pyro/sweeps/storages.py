"""Optuna studies in a database, and the heartbeats by which machines know who is alive."""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import IntegrityError

from blora_pyro.errors import UserError

HEARTBEAT = 60  # seconds; what is run on another machine and misses three is dead


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's log and its warnings of what may change in it out of the terminal."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.CRITICAL)  # an error is raised, too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def kind_of(url: str) -> str:
    """Of storage; what follows in a URL may hold a password."""
    return url.partition("://")[0]


def reason(error: Exception) -> str:
    """What a database, its driver or Optuna say, in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def begin_study(storage: BaseStorage, name: str, metrics: Sequence[str]) -> optuna.Study:
    """Begin a study that minimises these metrics, or join it.

    Raises:
        UserError: If the study of that name has others.
        Exception: Whatever else the storage raises.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=["minimize"] * len(metrics),
        load_if_exists=True,
    )
    if len(study.directions) == len(metrics) and not study.metric_names:
        study.set_metric_names([*metrics])
    if study.metric_names != [*metrics]:
        raise UserError(f"study '{name}' is of something else; give another study name")
    return study


def join_database(url: str, name: str, metrics: Sequence[str]) -> tuple[optuna.Study, RDBStorage]:
    """Begin or join a study in a database, whose tables are made if it is empty.

    Returns:
        The study and its storage.

    Raises:
        UserError: If it can't be opened, or the study of that name is another.
    """
    tries = 5
    while True:
        try:
            storage = RDBStorage(
                url,
                {"pool_pre_ping": True},  # a fit may outlast the database's patience
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
            )
            return begin_study(storage, name, metrics), storage
        except UserError:
            raise
        except Exception as error:  # whatever a database and its driver raise
            tries -= 1
            raced = isinstance(error, IntegrityError) or "already exists" in str(error)
            if raced and tries:  # another machine makes the tables at this moment
                time.sleep(0.5)
                continue
            raise UserError(
                f"storage '{kind_of(url)}' can't be opened ({reason(error)}); give "
                "sqlite:///FILE or postgresql+psycopg://..., or leave it out for files in the "
                "output"
            ) from None


@contextmanager
def beating(storage: RDBStorage, trial: int) -> Iterator[None]:
    """Heartbeats of a trial for the time of a `with`, from a thread.

    Args:
        storage: Of the trial.
        trial: Its id.
    """
    ended = Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            try:
                storage.record_heartbeat(trial)
            except Exception:  # the database is away; it has until the third beat to come back
                continue

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
