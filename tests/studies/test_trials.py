import sys
import time
from contextlib import ExitStack

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from blora_pyro.errors import UserError
from blora_pyro.studies.trials import DATABASE, MISSED, RUN_FOLDER, Trials, quiet_optuna

from ..forks import ended, start
from .conftest import no_heartbeat_for_an_hour

METRICS = ("error",)


@pytest.fixture(autouse=True)
def quiet():
    with quiet_optuna():
        yield


@pytest.fixture
def opened(tmp_path):
    """Opens the trials of a study, as processes do, and closes their databases."""
    with ExitStack() as stack:
        yield lambda output="out", metrics=METRICS, **more: stack.enter_context(
            Trials(tmp_path / output, metrics, **more)
        )


def ask(trials, **more):
    """Take a trial, as a process that dies before its heartbeats."""
    with pytest.warns(UserWarning, match="Heartbeat of storage"):
        return trials.study.ask(**more)


def states(trials):
    return [one.state for one in trials.of()]


def test_a_trial_that_waits_is_worked_on_once(opened):
    here, there = opened(), opened()
    seen = []

    def objective(trial):
        seen.append(trial.user_attrs.get(RUN_FOLDER))
        return 1.0

    here.run_next(objective, {RUN_FOLDER: "a"})
    there.run_next(objective, {RUN_FOLDER: "b"})
    assert seen == ["a", "b"]
    assert states(here) == [TrialState.COMPLETE] * 2


def test_of_trials_with_one_folder_the_first_that_is_open_counts(opened):
    trials = opened()
    for _ in range(2):
        trials.study.enqueue_trial({}, user_attrs={RUN_FOLDER: "a"})
    first, second = ask(trials), ask(trials)
    assert trials.open_runs() == {"a"}
    assert trials.is_first(first) and not trials.is_first(second)
    trials.study.tell(first, 1.0)
    assert trials.is_first(second)


@pytest.mark.parametrize("error", [UserError("the disk is full"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_trial_lets_it_wait_again_with_its_parameters(opened, error):
    trials, seen = opened(), []

    def interrupted(trial):
        trial.set_user_attr(RUN_FOLDER, "a")
        seen.append(trial.suggest_float("x", 1, 2))
        raise error

    def goes_on(trial):
        seen.append(trial.suggest_float("x", 1, 2))
        assert trial.user_attrs[RUN_FOLDER] == "a"
        return 1.0

    with pytest.raises(type(error)):
        trials.run_next(interrupted)
    trials.run_next(goes_on)
    assert seen[0] == seen[1]
    assert states(trials) == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_loss_that_is_not_finite_is_an_outcome(opened):
    def diverges(trial):
        raise FloatingPointError("nan at step 3")

    trials = opened()
    trials.run_next(diverges)
    assert states(trials) == [TrialState.FAIL]


def test_a_trial_that_misses_its_heartbeat_waits_again(opened, tmp_path):
    dead, living = opened(), opened()
    dead.study.enqueue_trial({"x": 1.5}, user_attrs={RUN_FOLDER: "a"})
    space = {"x": optuna.distributions.FloatDistribution(1, 2)}
    trial = ask(dead, fixed_distributions=space)
    dead._storage.record_heartbeat(trial._trial_id)
    living.end_stale()
    assert states(living) == [TrialState.RUNNING]
    no_heartbeat_for_an_hour(tmp_path / "out" / DATABASE)
    living.end_stale()
    assert states(living) == [TrialState.FAIL, TrialState.WAITING]
    again = living.of(TrialState.WAITING)[0]
    assert again.user_attrs == {RUN_FOLDER: "a"} and again.params == {"x": 1.5}


def test_who_died_before_the_first_heartbeat_is_found_too(opened, tmp_path):
    living = opened(heartbeat=1)
    ask(living)
    living.end_stale()
    living._seen[0] -= MISSED + 1  # seen so many seconds ago
    living.end_stale()
    no_heartbeat_for_an_hour(tmp_path / "out" / DATABASE)
    living.end_stale()
    assert states(living) == [TrialState.FAIL, TrialState.WAITING]


def test_a_process_that_was_taken_for_dead_loses_its_trial_and_nothing_else(opened, tmp_path):
    slow, quick = opened(), opened()

    def sleeps(trial):
        time.sleep(0.5)  # until the first heartbeat is there
        no_heartbeat_for_an_hour(tmp_path / "out" / DATABASE)
        quick.end_stale()
        trial.set_user_attr("late", 1)
        return 1.0

    slow.run_next(sleeps, {RUN_FOLDER: "a"})
    assert states(slow) == [TrialState.FAIL, TrialState.WAITING]


def work(folder, name):
    """What a process does, once three are ready."""
    (folder / f"ready-{name}").touch()
    while len(list(folder.glob("ready-*"))) < 3:
        time.sleep(0.01)

    def objective(trial):
        if not trials.is_first(trial) and trial.user_attrs:
            raise AssertionError
        with open(folder / "done", "a") as file:
            file.write(trial.user_attrs.get("run", "none") + " ")
        return 1.0

    with quiet_optuna():
        trials = Trials(folder / "out", METRICS)
        for number in range(5):
            trials.run_next(objective, {RUN_FOLDER: f"{name}-{number}"})


def test_processes_that_start_at_once_share_the_trials_and_do_none_twice(tmp_path, opened):
    told = tmp_path / "errors"
    workers = [start(work, tmp_path, name, streams=[None, told]) for name in "abc"]
    assert ended(*workers) == [0, 0, 0] and told.read_text() == ""
    done = (tmp_path / "done").read_text().split()
    wanted = {f"{name}-{number}" for name in "abc" for number in range(5)}
    assert len([one for one in done if one != "none"]) == len({*done} - {"none"})
    left = {one.user_attrs[RUN_FOLDER] for one in opened().of(TrialState.WAITING)}
    assert {*done} - {"none"} | left == wanted


def test_postgresql_without_its_driver_names_the_extra(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"needs psycopg, .*'blora-pyro\[studies,postgresql\]'"):
        opened(storage="postgresql+psycopg://localhost/nothing")


@pytest.mark.parametrize("url", ["nowhere", "oracel://here", "sqlite:////nowhere/at/all.db"])
def test_a_storage_that_cannot_be_opened_is_told_in_one_line(opened, url):
    with pytest.raises(UserError, match=r"^storage '.*' can't be opened .*; give sqlite") as error:
        opened(storage=url)
    assert "\n" not in str(error.value)


def test_a_damaged_database_is_told_in_one_line(opened, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / DATABASE).write_text("no database, and more than a header " * 9)
    with pytest.raises(UserError, match=r"^storage 'study.db' can't be opened") as error:
        opened()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("away", [StorageInternalError("x"), OperationalError("x", {}, None)])
def test_that_the_database_is_away_is_told_whatever_it_leads_to(opened, tmp_path, away):
    with pytest.raises(
        UserError, match=r"can't be reached .*; no trial is lost, .* back$"
    ) as error:
        with Trials(tmp_path, METRICS):
            try:
                raise away
            finally:
                raise UnboundLocalError("as of Optuna, where it can't tell")
    assert error.value.__suppress_context__
    for other in (UserError("other"), KeyError("other"), KeyboardInterrupt()):
        with pytest.raises(type(other)), Trials(tmp_path, METRICS):
            raise other


def test_a_heartbeat_that_fails_is_no_error(opened, tmp_path):
    trials = opened()
    trials._storage.engine.dispose()
    (tmp_path / "out" / DATABASE).unlink()
    (tmp_path / "out" / DATABASE).mkdir()
    trials._storage.record_heartbeat(0)
    with pytest.raises(StorageInternalError):
        trials.of()


def test_a_study_of_something_else_is_refused(opened, tmp_path):
    opened(metrics=("one", "other"), storage=f"sqlite:///{tmp_path}/all.db", name="mine")
    with pytest.raises(UserError, match="study 'mine' is of something else; give another study"):
        opened(storage=f"sqlite:///{tmp_path}/all.db", name="mine")


def test_an_output_that_cannot_be_written_is_refused(opened, tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UserError, match="can't be written"):
        opened(output="letter.txt/out")


def test_optuna_is_as_loud_as_before_afterwards():
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with quiet_optuna():
        assert optuna.logging.get_verbosity() > optuna.logging.ERROR
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
