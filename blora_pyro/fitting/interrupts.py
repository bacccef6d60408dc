"""SIGINT and SIGTERM, answered after the step that they come in."""

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

    Only the main thread can set handlers: elsewhere, and with `active=False`, signals are left
    alone. The handlers that were there come back at the end.

    Attributes:
        caught: Number of the signal that waits for the end of the step, or None.
    """

    def __init__(self, active: bool = True) -> None:
        """Nothing is touched before the `with`."""
        self.caught: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._deferring = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Take the signals."""
        if self._active:
            self._handlers = {one: signal.signal(one, self._handle) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for one, handler in self._handlers.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a first signal only sets `caught`, and is raised at the end; a second at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.answer()

    def answer(self) -> None:
        """Raise the signal that waits, if one does.

        Raises:
            Interrupted: By that signal.
        """
        if self.caught is not None:
            raise Interrupted(self.caught)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.caught = self.caught is not None, signum
        if again or not self._deferring:
            raise Interrupted(signum)
