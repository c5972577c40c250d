"""What keeps Orbax silent about reads and writes that fail.

Beside one that fails, Orbax abandons others that are under way. What they raise then has nobody to be raised
to, so that Python and asyncio print a stack trace of each. The failure itself is raised, and told in a line.
"""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def try_to_read(read: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """Return what a function returns, and why it did not where it raised."""
    with abandoned_unheard(""):
        try:
            return read(*arguments), ""
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            why = reason(error)
        wait_for_abandoned()
        return None, why


def wait_for_abandoned() -> None:
    """Wait until the reads and writes abandoned beside one that failed come to their end, still unheard."""
    time.sleep(0.5)  # nothing says when that is
    gc.collect()


@contextlib.contextmanager
def abandoned_unheard(said: str) -> Iterator[None]:
    """Print no stack trace of each read and write that Orbax abandons beside one that fails.

    Args:
        said: how what Python says of one begins; all begins with "".
    """
    hook, of_callbacks, log = sys.unraisablehook, sys.excepthook, logging.getLogger("asyncio")
    disabled, log.disabled = log.disabled, True

    def unless_abandoned(raised: "sys.UnraisableHookArgs") -> None:
        if not str(raised.exc_value).startswith(said):
            hook(raised)

    def unless_called_back(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not str(error).startswith(said):
            of_callbacks(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unless_abandoned, unless_called_back
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook, log.disabled = hook, of_callbacks, disabled


def reason(error: BaseException) -> str:
    """Return what the first cause of an error says, without the places in source files that libraries add."""
    while error.__cause__:
        error = error.__cause__
    return str(error).strip().split("\n")[0].split(" [")[0].rstrip(":") or type(error).__name__
