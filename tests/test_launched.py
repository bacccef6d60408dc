import pytest

from blora_pyro.launched import is_main, started


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_that_was_started_alone_is_the_main_one():
    assert started() == 1 and is_main()


@pytest.mark.parametrize(("rank", "main"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_is_the_main_one(monkeypatch, rank, main):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert started() == 2 and is_main() == main
