"""What a command writes to the terminal, a pipe or a log, which may go away before its work is done."""

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO


class _Lasting(io.FileIO):
    """A descriptor to which no write fails: what nobody takes is dropped.

    Attributes:
        lost: whether anything was.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "wb", closefd=False)
        self.lost = False

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                self._lose(error)
                break
            if written is None:
                select.select([], [self], [])  # another program made the terminal non-blocking
            rest = rest[written or 0 :]
        return len(data)

    def _lose(self, error: OSError) -> None:
        if not self.lost and self.fileno() == 1:  # stdout, which may be data, says nothing of stderr
            with contextlib.suppress(OSError):
                os.write(2, f"\nstdout cannot be written: {error.strerror}; the work goes on\n".encode())
        self.lost = True


def keep() -> None:
    """Let no write to stdout and stderr of this process fail from now on, and no character.

    Neither a closed pipe, a terminal that is gone, a full disk nor an encoding that lacks a character is an
    error then. A stream that is closed leads nowhere, so that no file takes its place and what is written.
    """
    _fill_gaps()
    sys.stdout = _lasting(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__, 2)


def are_lost() -> bool:
    """Return whether anything that was printed on stdout could not be written."""
    sys.stdout.flush()
    buffer: Any = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return isinstance(raw, _Lasting) and raw.lost


def _fill_gaps() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free


def _lasting(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None and stream is not original:
        return stream  # that of a caller, as of a notebook
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    raw: Any = _Lasting(descriptor)
    unbuffered = getattr(stream, "write_through", False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=unbuffered,
    )
