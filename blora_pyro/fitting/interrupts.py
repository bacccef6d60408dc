"""SIGINT and SIGTERM, raised after the step during which they arrive."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from blora_pyro.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """SIGINT and SIGTERM raise `Interrupted` for the time of a `with`; see `deferred`.

    Only the main thread can set handlers: in others, and with `active=False`, signals are left
    alone. The earlier handlers are restored at the end.

    Attributes:
        caught: Number of the pending signal, or None.
    """

    def __init__(self, active: bool = True) -> None:
        """Install no handler before the `with`."""
        self.caught: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._deferring = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Install the handlers."""
        if self._active:
            self._handlers = {one: signal.signal(one, self._handle) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the earlier handlers."""
        for one, handler in self._handlers.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside a `with` keep a first signal in `caught` until the end; raise a second at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.answer()

    def answer(self) -> None:
        """Raise `Interrupted` if a signal is pending."""
        if self.caught is not None:
            raise Interrupted(self.caught)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.caught = self.caught is not None, signum
        if again or not self._deferring:
            raise Interrupted(signum)
