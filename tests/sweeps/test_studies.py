import os
import signal
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from blora_pyro.errors import UserError
from blora_pyro.sweeps.storages import quiet_optuna
from blora_pyro.sweeps.studies import FileLock, SharedStudy


@pytest.fixture(autouse=True)
def quiet():
    with quiet_optuna():
        yield


@pytest.fixture
def opened(tmp_path):
    """Opens studies, and closes their databases."""
    studies = []

    def open_study(storage=None, folder="sweep", name=None, seed=0):
        studies.append(SharedStudy(tmp_path / folder, storage, name, seed))
        return studies[-1]

    yield open_study
    for one in studies:
        backend = getattr(one.study._storage, "_backend", None)
        if engine := getattr(backend, "engine", None):
            one.study._storage.remove_session()
            engine.dispose()


def values_of(trial):
    return trial.suggest_float("x", 1, 2), trial.suggest_float("y", 1, 2)


def ends_well(trial, folder):
    return values_of(trial)


def fails(trial, folder):
    values_of(trial)
    raise UserError("the disk is full")


def params(study, *states):
    return [one.params for one in study.trials(*states)]


# ---- locks


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    one, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert one.acquire()
    assert not other.acquire(wait=False)
    one.release()
    one.release()
    assert other.acquire(wait=False)
    other.release()


# ---- a study


def test_a_study_runs_as_many_trials_as_are_wanted_in_all(opened):
    study = opened()
    while study.run_next(ends_well, 3):
        pass
    assert len(study.finished()) == 3
    again = opened()
    assert not again.run_next(ends_well, 3)
    assert again.run_next(ends_well, 4)
    assert not again.run_next(ends_well, 4)
    assert [one.number for one in again.trials()] == [0, 1, 2, 3]
    assert not list(again.folder.glob("trial-*.lock"))


def test_the_values_hang_on_the_seed_and_not_on_when_the_study_was_opened(opened):
    one, stopped, other = (opened(None, name, seed=seed) for name, seed in ("a0", "b0", "c1"))
    for study in (one, one, stopped, opened(None, "b", seed=0), other):
        study.run_next(ends_well, 9)
    assert params(one) == params(stopped)
    assert params(other)[0] != params(one)[0]
    assert params(one)[0] != params(one)[1]


def test_a_fit_that_diverges_is_an_outcome(opened):
    def diverges(trial, folder):
        values_of(trial)
        raise FloatingPointError("nan at step 3")

    study = opened()
    assert study.run_next(diverges, 1)
    assert not study.run_next(ends_well, 1)
    (trial,) = study.finished()
    assert trial.state == TrialState.FAIL and trial.user_attrs["failure"] == "nan at step 3"


@pytest.mark.parametrize("error", [UserError("the disk is full"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_values_is_tried_again_in_the_same_folder(opened, error):
    seen = []

    def interrupted(trial, folder):
        seen.append((values_of(trial), folder))
        raise error

    def goes_on(trial, folder):
        seen.append((values_of(trial), folder))
        return 1.0, 1.0

    study = opened()
    with pytest.raises(type(error)):
        study.run_next(interrupted, 1)
    assert study.run_next(goes_on, 1)
    assert seen[0] == seen[1]
    assert seen[0][1].name == "trial-0"
    assert not study.run_next(goes_on, 1)  # and only once
    assert len(study.trials()) == 2


# ---- several processes, each of which may die

WORKER = """
import os, signal, sys
from pathlib import Path
from blora_pyro.sweeps.storages import quiet_optuna
from blora_pyro.sweeps.studies import SharedStudy

folder, how = Path(sys.argv[1]), sys.argv[2]

def objective(trial, folder):
    x, y = trial.suggest_float("x", 1, 2), trial.suggest_float("y", 1, 2)
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits":
        print("begun", flush=True)
        sys.stdin.readline()
    with open(folder.parent / "done", "a") as file:
        file.write(f"{folder.name}\\n")
    return x, y

with quiet_optuna():
    study = SharedStudy(folder, None, None, 0)
    while study.run_next(objective, 5):
        pass
"""


def start(tmp_path, how):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "sweep"), how]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ)


def test_two_processes_share_the_trials_and_repeat_none(tmp_path, opened):
    study = opened()
    workers = [start(tmp_path, "runs") for _ in range(2)]
    assert [worker.communicate() and worker.returncode for worker in workers] == [0, 0]
    assert len(study.finished()) == len(study.trials()) == 5
    assert len({one["x"] for one in params(study)}) == 5
    done = (tmp_path / "sweep" / "done").read_text().split()
    assert sorted(done) == [f"trial-{number}" for number in range(5)]


def test_a_dead_trial_is_retried_at_once_and_a_living_one_is_left_alone(tmp_path, opened):
    study = opened()
    dead = start(tmp_path, "dies")
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    (lost,) = study.trials(TrialState.RUNNING)
    living = start(tmp_path, "waits")
    assert living.stdout.readline() == "begun\n"  # with what was lost
    seen = []

    def objective(trial, folder):
        seen.append(folder.name)
        return values_of(trial)

    while study.run_next(objective, 5):
        pass
    assert seen == ["trial-2", "trial-3", "trial-4", "trial-5"]
    (running,) = study.trials(TrialState.RUNNING)
    assert running.params == lost.params
    living.communicate("\n")
    assert (tmp_path / "sweep" / "done").read_text() == "trial-0\n"
    assert len(study.finished()) == 5


def test_with_a_database_a_trial_in_another_folder_is_left_to_its_heartbeat(tmp_path, opened):
    url = f"sqlite:///{tmp_path}/study.db"
    here, there = opened(url, "here", "shared"), opened(url, "there", "shared")
    with there.locked():  # as if another machine had died in it
        with pytest.warns(UserWarning, match="Heartbeat of storage"):
            there.study.ask({"x": optuna.distributions.FloatDistribution(1, 2)})
    assert not here.run_next(ends_well, 1)
    backend = here.study._storage._backend
    with backend.engine.begin() as connection:
        (trial,) = here.trials(TrialState.RUNNING)
        connection.exec_driver_sql(
            "INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES (?, '2020-01-01 00:00:00')",
            (trial._trial_id,),
        )
    assert here.run_next(ends_well, 1)
    assert here.finished()[0].params["x"] == trial.params["x"]


def test_of_two_machines_at_the_last_trial_one_withdraws(opened, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    here, there = opened(url, "here", "shared"), opened(url, "there", "shared")
    here._requeue_dead = lambda: there.study.ask()  # the other one begins after we have counted
    here.trials = lambda *states: [] if states == (TrialState.RUNNING,) else there.trials(*states)
    with pytest.warns(UserWarning, match="Heartbeat of storage"):
        assert here.run_next(ends_well, 1)
    assert [one.state for one in there.trials()] == [TrialState.RUNNING, TrialState.PRUNED]
    assert here.finished() == []


def test_of_two_machines_that_retry_a_trial_one_withdraws(opened, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    here, there = opened(url, "here", "shared"), opened(url, "there", "shared")
    with pytest.raises(UserError):
        here.run_next(fails, 1)
    for _ in range(2):  # both saw it dead at once
        here.study.enqueue_trial(here.trials()[0].params, user_attrs={"retry_of": 0})
    assert here.run_next(ends_well, 9)
    assert there.run_next(ends_well, 9)
    states = [TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED]
    assert [one.state for one in here.trials()] == states


# ---- what is refused


def test_options_of_another_sweep_are_refused(opened):
    opened().settle({"rank": 8, "data": ("a", "b")})
    opened().settle({"rank": 8, "data": ["a", "b"]})
    with pytest.raises(UserError, match="has rank = 8, not 16; give the same, or start another"):
        opened().settle({"rank": 16, "data": ("a", "b")})
    with pytest.raises(UserError, match="has lr = None, not 1"):
        opened().settle({"rank": 8, "data": ("a", "b"), "lr": 1})


def test_the_folder_of_another_study_is_refused(opened, tmp_path):
    opened().run_next(ends_well, 1)
    words = "is of study 'sweep' in study.log, not of study 'mine' in study.log; give the same"
    with pytest.raises(UserError, match=words):
        opened(name="mine")
    with pytest.raises(UserError, match="not of study 'sweep' in sqlite; give the same"):
        opened(f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(UserError, match="can't be opened"):
        opened("nowhere", folder="other")
    opened(folder="other")  # nothing was begun


def test_a_folder_with_something_else_is_refused(opened, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match="mine' holds something, but no sweep; give another"):
        opened(folder="mine")
    with pytest.raises(UserError, match="can't be written"):
        opened(folder="mine/letter.txt/sweep")


@pytest.mark.parametrize("url", ["nowhere", "oracel://here", "sqlite:////nowhere/at/all.db"])
def test_a_storage_that_cannot_be_opened_is_told_in_one_line(opened, url):
    with pytest.raises(UserError, match=r"^storage '.*' can't be opened .*; give sqlite") as error:
        opened(url)
    assert "\n" not in str(error.value)


def test_a_damaged_journal_is_told_in_one_line(opened, tmp_path):
    opened().run_next(ends_well, 1)
    journal = tmp_path / "sweep" / "study.log"
    journal.write_text("{half" + journal.read_text())
    with pytest.raises(UserError, match=r"study.log is damaged .*; bring back a copy, or start"):
        opened()


def test_a_study_of_something_else_is_refused(tmp_path, opened):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=url, study_name="one", direction="minimize")
    with pytest.raises(UserError, match="study 'one' is of something else; give another study"):
        opened(url, name="one")
    study = opened(url, name="two")
    study.run_next(ends_well, 1)
    with pytest.raises(UserError, match="study 'two' is of something else"):
        study.settle({"rank": 8})


def test_optuna_is_as_loud_as_before_afterwards():
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with quiet_optuna():
        assert optuna.logging.get_verbosity() > optuna.logging.ERROR
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
