import math

import pytest

from blora_pyro.errors import (
    Interrupted,
    UserError,
    check_positive,
    is_out_of_memory,
    printable,
    reason,
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
