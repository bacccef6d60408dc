"""What messages about data have in common: where the fault is, and text that prints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from blora_pyro.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BadRow(UserError):
    """A row that cannot be used.

    Attributes:
        origin: where it stands, such as "train.csv, line 3".
        reason: what is wrong with it.
        source: the place of its source among those of a mixture.
    """

    def __init__(self, origin: str, reason: str, source: int = 0) -> None:
        """See the attributes."""
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason, self.source = origin, reason, source


OnBadRow = Callable[[BadRow], object]  # what is to be done: raise it, or keep it and go on


class Unreadable(UserError):
    """A row after which no other can be read: no row to be skipped."""


def stop(error: BadRow) -> NoReturn:
    """Raise it: the `OnBadRow` that is meant where nothing else is said."""
    raise error


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Put "origin: " before the message of a `UserError` that is raised inside.

    Args:
        origin: where a row stands, such as "train.csv, line 3".

    Raises:
        BadRow: the error from inside, located; `Unreadable` stays what it is.
    """
    try:
        yield
    except Unreadable as error:
        raise Unreadable(f"{origin}: {error}") from error.__cause__
    except UserError as error:
        raise BadRow(origin, str(error)) from error.__cause__


def all_bad(errors: Sequence[BadRow]) -> str:
    """Say that no row is left."""
    return f"all rows are bad ({len(errors):,}); the first: {errors[0]}"


def printable(value: object, limit: int = 300) -> str:
    """Return a path or a name as text that prints on one line; its end, if it is too long."""
    text = "".join(char if char.isprintable() else REPLACEMENT for char in str(value))
    return text if len(text) <= limit else "…" + text[-limit:]


def reason(error: BaseException, limit: int = 200) -> str:
    """Return what an exception of other people's code says, as one line of `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else REPLACEMENT for char in text)
    return text if len(text) <= limit else text[:limit] + "…"
