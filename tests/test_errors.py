import math

import pytest

from blora_pyro.errors import (
    Interrupted,
    UserError,
    check_positive,
    is_main,
    is_out_of_memory,
    printable,
    reason,
    started,
)


def test_a_number_that_is_not_above_0_and_finite_is_refused_by_name():
    check_positive(lr=1e-9, rank=3, alpha=None)
    for value in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"^rank is {value}; give a number above 0$"):
            check_positive(lr=1.0, rank=value)


def test_an_interruption_has_the_exit_code_of_a_shell():
    assert Interrupted(2).exit_code == 130
    error = Interrupted(15, "interrupted; all is safe")
    assert error.exit_code == 143 and str(error) == "interrupted; all is safe"
    assert isinstance(error, KeyboardInterrupt)


def test_a_name_prints_on_one_line_and_of_a_long_one_the_end():
    assert printable("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert printable("x" * 10 + "end", limit=5) == "…xxend"


def test_an_error_is_one_line_whatever_it_names():
    assert str(UserError("no prior 'a\nb\u2028c'; give another")) == (
        "no prior 'a b c'; give another"
    )


def test_errors_of_full_memory_are_known_by_their_words():
    for error in (
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(12, "Cannot allocate memory"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("sizes differ"))


def test_an_error_of_other_code_is_one_line_of_limited_length():
    assert reason(ValueError("two\n  lines")) == "two lines"
    assert reason(ValueError()) == "ValueError"
    assert reason(ValueError("x" * 300)) == "x" * 200 + "…"


@pytest.fixture
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_process_that_was_started_alone_is_the_main_one():
    assert started() == 1 and is_main()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rank", "main"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_is_the_main_one(monkeypatch, rank, main):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert started() == 2 and is_main() == main
