"""The one exception that bad input raises."""

import math


class UserError(Exception):
    """Bad input, told in one line: what was given, what is allowed, what to do.

    The command line prints it and exits with code 2.
    """


def check_positive(**values: float | None) -> None:
    """Refuse what is no finite number above 0; None passes.

    Raises:
        UserError: Naming the first such value.
    """
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; give a number above 0")
