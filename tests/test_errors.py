import math

import pytest

from blora_pyro.errors import Interrupted, UserError, check_positive, printable, reason


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
    assert printable("a\nb\x1b[31m") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m"
    assert printable("x" * 10 + "end", limit=5) == "…xxend"


def test_an_error_of_other_code_is_one_line_of_limited_length():
    assert reason(ValueError("two\n  lines")) == "two lines"
    assert reason(ValueError()) == "ValueError"
    assert reason(ValueError("x" * 300)) == "x" * 200 + "…"
