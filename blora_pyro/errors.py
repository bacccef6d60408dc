"""The exceptions that end in one line (bad input, an interruption), and who of several tells."""

import math
import os

from blora_pyro.terminal import escaped

# What torch, oneDNN, the C++ library and the operating system say of full memory.
OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "annot allocate memory"),
    *("could not create a primitive", "bad_alloc", "nable to allocate"),
)


class UserError(Exception):
    """Bad input, told in one line: what was given, what is allowed, what to do.

    The command line prints it and exits with code 2.
    """

    def __str__(self) -> str:
        """Return the message as one line, whatever the names in it hold."""
        return " ".join(super().__str__().splitlines())


class ProcessLost(UserError):
    """One of several processes is gone, and this is the one to say so."""


class OtherProcessFailed(UserError):
    """Another process of this fit reports the error that ended all; this one prints nothing."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, told in one line; the command line prints it and exits with its code."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        """An interruption by a signal.

        Args:
            signum: Of the signal.
            message: What happened, what is safe on disk, what to do.
        """
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell shows for the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


def check_positive(**values: float | None) -> None:
    """Refuse what is no finite number above 0; None passes.

    Raises:
        UserError: Naming the first such value.
    """
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; give a number above 0")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full, the machine's or a GPU's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def printable(value: object, limit: int = 300) -> str:
    """Return a path or a name as text that prints on one line; its end, if it is too long."""
    text = escaped(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= limit else "…" + text[-limit:]


def reason(error: BaseException, limit: int = 200) -> str:
    """Return what an exception of other people's code says, as one line of `limit` characters."""
    text = escaped(" ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= limit else text[:limit] + "…"


# ---- processes that `accelerate launch` or `torchrun` has started together


def started() -> int:
    """How many processes were started together with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is to write and report; before `Processes.join`, too."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"
