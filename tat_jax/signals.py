"""SIGINT, SIGTERM and SIGHUP, which end a training, or predictions, in order."""

import contextlib
import os
import signal
import threading
from typing import Any, Self

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Work was asked to stop, and what it had done is saved, or nothing of it is left.

    Attributes:
        signal: what asked, as in `signal.SIGTERM`.
    """

    def __init__(self, message: str, number: int, *, then: str = "continues from there"):
        super().__init__(f"{message}; the same command {then}")
        self.signal = number


def act_at_once() -> None:
    """Let Ctrl-C end this process without a stack trace; whoever started it to ignore Ctrl-C is obeyed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: the first is noted for the loop to see, the second acts as always.

    A terminal that closes may send SIGHUP several times, so that it never counts as the second. What the
    process was started to ignore, as with nohup, stays ignored. In a thread beside the main one, where Python
    takes no signals, none is noted.

    Attributes:
        received: the number of the first, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A terminal that closes sends SIGHUP again while the last checkpoint is still being written.
        self._restore(*(number for number in _NUMBERS if number != signal.SIGHUP or not self.received))

    def listen(self) -> None:
        """Note signals from now on; while the first step is compiled they act as always: nothing is lost."""
        if not self._before and threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received:  # SIGHUP once more
            return
        self.received = number
        self._restore(signal.SIGINT, signal.SIGTERM)
        with contextlib.suppress(OSError):  # of a terminal that is gone
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be at work

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before[number])
