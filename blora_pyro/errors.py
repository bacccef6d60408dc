"""The one exception that bad input raises."""


class UserError(Exception):
    """Bad input, told in one line: what was given, what is allowed, what to do.

    The command line prints it and exits with code 2.
    """
