"""SIGINT and SIGTERM, which end a training in order."""

import os
import signal
from typing import Any, Self


class Interrupted(Exception):
    """Training was asked to stop, and what it had done is saved.

    Attributes:
        signal: what asked, as in `signal.SIGTERM`.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class StopSignals:
    """SIGINT and SIGTERM: the first is noted for the loop to see, the second acts as always.

    Attributes:
        received: the number of the first, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def listen(self) -> None:
        """Note signals from now on; while the first step is compiled they act as always: nothing is lost."""
        if not self._before:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be at work already

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
