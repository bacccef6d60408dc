"""What messages about data have in common: where the fault is, and text that prints."""

from collections.abc import Iterator
from contextlib import contextmanager

from blora_pyro.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Put "origin: " before the message of a `UserError` that is raised inside.

    Args:
        origin: where a row stands, such as "train.csv, line 3".

    Raises:
        UserError: the one from inside, located.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error.__cause__


def printable(value: object, limit: int = 300) -> str:
    """Return a path or a name as text that prints on one line; its end, if it is too long."""
    text = "".join(char if char.isprintable() else REPLACEMENT for char in str(value))
    return text if len(text) <= limit else "…" + text[-limit:]


def reason(error: BaseException, limit: int = 200) -> str:
    """Return what an exception of other people's code says, as one line of `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else REPLACEMENT for char in text)
    return text if len(text) <= limit else text[:limit] + "…"
