"""Long recordings, decoded as their samples are asked for, so that few are in memory."""

from collections.abc import Callable, Iterator

import numpy as np

from blora_pyro.data.audio import Wave
from blora_pyro.errors import UserError


class StreamedWave:
    """Samples, as good as an array (samples,), of which slices are read from front to back.

    A slice that begins before the last one did is right, too, but everything is decoded anew.
    """

    def __init__(self, name: str, blocks: Callable[[], Iterator[Wave]]) -> None:
        """Decode everything once, for its length and to see whether it can be.

        Args:
            name: In messages.
            blocks: Begins anew with every call; see `data.stream_audio`.

        Raises:
            UserError: By `blocks`.
        """
        self.name, self._blocks = name, blocks
        self._length = sum(len(block) for block in blocks())
        self._restart()

    def _restart(self) -> None:
        self._rest, self._first = self._blocks(), 0
        self._held = np.zeros(0, np.float32)  # the samples from `_first` on

    def __len__(self) -> int:
        """The number of samples."""
        return self._length

    def __getitem__(self, span: slice) -> Wave:
        """Return the samples of a span.

        Raises:
            UserError: If the file has become shorter.
        """
        first, end, _ = span.indices(self._length)
        if first < self._first:
            self._restart()
        while self._first + len(self._held) < end:
            passed = min(first - self._first, len(self._held))
            block = next(self._rest, None)
            if block is None:
                raise UserError(f"{self.name} was changed while it was read; try again")
            self._held = np.concatenate([self._held[passed:], block])
            self._first += passed
        self._held, self._first = self._held[first - self._first :], first
        return self._held[: end - first].copy()
