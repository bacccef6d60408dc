import json
import shutil
import sqlite3
from threading import Event

import pytest
from optuna.storages import RDBStorage

from blora_pyro.comparison.comparing import compare_methods
from blora_pyro.comparison.rows import RowStore
from blora_pyro.comparison.shared_rows import SharedRows
from blora_pyro.errors import UserError
from blora_pyro.sweeps import storages
from blora_pyro.sweeps.storages import quiet_optuna

from .conftest import row_content

ROW = row_content(0.2, {"de": 0.1})
OTHER = row_content(0.3, {"de": 0.1})
READY = {"skip_table_creation": True, "skip_compatibility_check": True}


@pytest.fixture(autouse=True)
def quiet():
    with quiet_optuna():
        yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A database with the tables of Optuna and nothing in them; to make them takes a while."""
    path = tmp_path_factory.mktemp("tables") / "study.db"
    RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def database(tmp_path, tables, monkeypatch):
    """URL of an empty database, whose connections are closed afterwards."""
    shutil.copy(tables, tmp_path)
    opened = []

    def connect(*given, **more):
        opened.append(RDBStorage(*given, **more, **READY))
        return opened[-1]

    monkeypatch.setattr(storages, "RDBStorage", connect)
    yield f"sqlite:///{tmp_path}/study.db"
    for one in opened:
        one.remove_session()
        one.engine.dispose()


@pytest.fixture
def store(tmp_path, database):
    """Opens the store of a machine, whose output is a folder of its own."""
    return lambda machine: SharedRows(tmp_path / machine, database, "shared")


def states(store):
    return [one.state.name for one in store.study.get_trials()]


def no_heartbeat_for_an_hour(tmp_path):
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    connection.close()


def make(store, key, content, lock="fit"):
    with store.locked(lock) as mine:
        assert mine
        store.put(key, content)


def test_a_row_of_one_machine_comes_to_the_other_and_into_its_files(store, tmp_path):
    here, there = store("here"), store("there")
    make(here, "abc", ROW)
    assert there.get("abc") is None
    there.refresh()
    assert there.get("abc").about == here.get("abc").about
    alone = RowStore(tmp_path / "there").get("abc")
    assert alone.new_domain_error == pytest.approx(0.2)
    assert states(here) == ["COMPLETE"]
    assert here.study.trials[0].value == pytest.approx(alone.balanced_error)


def test_a_failed_row_is_shared_too(store):
    make(store("here"), "abc", {"failed": "nan", "sets": {}})
    there = store("there")
    there.refresh()
    assert there.get("abc").failed == "nan"


def test_a_lock_is_held_by_one_machine_at_a_time(store):
    here, there = store("here"), store("there")
    with here.locked("fit") as mine, there.locked("fit") as theirs:
        assert (mine, theirs) == (True, False)
        with there.locked("more") as free:
            assert free
    with there.locked("fit") as theirs:
        assert theirs
    with pytest.raises(ZeroDivisionError), here.locked("fit"):
        raise ZeroDivisionError
    with there.locked("fit") as theirs:
        assert theirs
    assert states(here) == ["FAIL"] * 5  # and none for what was not free


def test_of_machines_that_claim_at_once_the_first_has_the_lock(store):
    here, there = store("here"), store("there")
    looked, claims = [], here._claims

    def see(key):  # the other machine claims, too, after we saw that nobody does
        found = claims(key)
        if not looked:
            looked.append(there._claimed(key))
        return found

    here._claims = see
    with here.locked("fit") as mine:
        assert not mine
    assert looked == [1]
    assert states(here) == ["RUNNING", "FAIL"]


def test_a_later_claim_does_not_take_the_lock_away(store):
    here, there = store("here"), store("there")
    blind = [[], *[there._claims] * 9]
    there._claims = lambda key: blind.pop(0)(key) if callable(blind[0]) else blind.pop(0)
    with here.locked("fit") as mine, there.locked("fit") as theirs:
        assert (mine, theirs) == (True, False)
    assert states(here) == ["FAIL", "FAIL"]


def test_the_lock_of_a_dead_machine_is_taken_over(store, tmp_path):
    dead, living = store("dead"), store("living")
    assert dead._claimed("fit") == 1
    with living.locked("fit") as mine:
        assert not mine
    no_heartbeat_for_an_hour(tmp_path)
    make(living, "abc", ROW)
    assert states(living) == ["FAIL", "COMPLETE"]


def test_who_died_before_its_first_heartbeat_gets_one(store, tmp_path):
    dead, living = store("dead"), store("living")
    dead._storage.record_heartbeat = lambda trial: None
    dead._claimed("fit")
    with living.locked("fit") as mine:
        assert not mine
    no_heartbeat_for_an_hour(tmp_path)
    with living.locked("fit") as mine:
        assert mine


def test_of_a_machine_that_was_slow_and_taken_for_dead_the_row_is_kept(store, tmp_path):
    slow, quick = store("slow"), store("quick")
    with slow.locked("fit"):
        no_heartbeat_for_an_hour(tmp_path)
        with quick.locked("fit") as taken:
            assert taken
            slow.put("abc", ROW)
            quick.put("abc", OTHER)
    for one in (slow, quick, store("third")):
        one.refresh()
        assert one.get("abc").new_domain_error == pytest.approx(0.2)
    assert states(slow).count("COMPLETE") == 1


def test_rows_that_were_there_before_are_put_into_the_database(store, tmp_path):
    RowStore(tmp_path / "here").put("abc", ROW)
    RowStore(tmp_path / "there").put("abc", OTHER)
    here, there = store("here"), store("there")
    assert here.get("abc").new_domain_error == pytest.approx(0.2)
    there.refresh()
    assert there.get("abc").new_domain_error == pytest.approx(0.2)
    assert states(here) == ["COMPLETE"]


def test_a_heartbeat_that_fails_is_tried_again(monkeypatch):
    monkeypatch.setattr(storages, "HEARTBEAT", 0.001)
    beats, enough = [], Event()

    class Away:
        def record_heartbeat(self, trial):
            beats.append(trial)
            if len(beats) > 2:
                enough.set()
            raise ConnectionError

    with storages.beating(Away(), 7):
        assert enough.wait(20)
    assert set(beats) == {7}


def test_a_database_that_is_away_is_told_in_one_line(store, tmp_path, monkeypatch):
    one = store("here")
    with pytest.raises(
        UserError, match=r"^storage 'sqlite' is away \(.*\); rows are safe in .*here: start"
    ):
        with one.locked("fit"):
            monkeypatch.setattr(one.study, "get_trials", lambda **_: 1 / 0)
            one.put("abc", ROW)
    assert json.loads((tmp_path / "here" / "rows" / "abc.json").read_text())["sets"] == ROW["sets"]


def test_a_study_of_something_else_is_refused(database, tmp_path):
    storages.join_database(database, "mine", ("new-domain error", "backward error"))
    with pytest.raises(UserError, match="study 'mine' is of something else; give another study"):
        SharedRows(tmp_path / "mine", database, None)
    with pytest.raises(UserError, match="storage 'nowhere' can't be opened"):
        SharedRows(tmp_path / "mine", "nowhere", None)


def test_what_one_machine_has_compared_another_only_reads(small, database, fake_rows, tmp_path):
    given = {**small, "methods": ["lora"], "storage": database, "study_name": "shared"}
    one = compare_methods(tmp_path / "here", **given)
    made = [*fake_rows]
    assert len(made) == one.made() == len(one.study.store.study.trials)
    other = compare_methods(tmp_path / "there", **given)
    assert fake_rows == made and other.unmade() == []
    assert len([*(tmp_path / "there" / "rows").iterdir()]) == len(made)
