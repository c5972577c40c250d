"""What a check prints: a line for each item, and no item is tried whose needs have failed."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tat_jax.quantities import duration

_COLUMN = 18  # where findings begin
_BEAT = 10.0  # seconds from one sign of life to the next


class Failed(NamedTuple):
    """Stands in for what an item would have found."""

    item: str


@contextlib.contextmanager
def _heartbeat(name: str) -> Iterator[None]:
    """Say on stderr which item is at work, and for how long already, wherever one takes long."""
    ended, since = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(_BEAT):
            print(f"{name} … {duration(time.monotonic() - since)}", file=sys.stderr, flush=True)

    if jax.process_index() > 0:
        yield
        return
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Items:
    """Check one item after the other in all processes alike; of the others only failures are printed."""

    def __init__(self) -> None:
        self._failed: list[str] = []

    def check(self, name: str, find: Callable[..., tuple[str, Any]], *arguments: Any) -> Any:
        """Print the finding of `find(*arguments)` and return what else it returns.

        Where it fails, or one of the arguments is of an item that has, return a `Failed`.
        """
        missing = [argument.item for argument in arguments if isinstance(argument, Failed)]
        if missing:
            self._print(name, f"left out: needs {', '.join(missing)}")
            return Failed(name)
        try:
            with _heartbeat(name):
                finding, found = find(*arguments)
        except Exception as error:  # Whatever it is, it would have stopped the training.
            logging.debug("in full:", exc_info=error)
            # Of these the message says all; it may be little of others.
            known = isinstance(error, ValueError | OSError | FloatingPointError | MemoryError)
            kind = "" if known else f"{type(error).__name__}: "
            finding, found = f"FAILED {kind}{error}", Failed(name)
            if jax.process_index() > 0:
                print(f"process {jax.process_index()}: {name} {finding}", flush=True)
        failed = isinstance(found, Failed)
        # A process that left an item out alone would keep the others waiting.
        if jax.process_count() > 1:
            somewhere = multihost_utils.process_allgather(np.array(failed)).any()
            if somewhere and not failed:
                finding, found, failed = "FAILED in another process", Failed(name), True
        self._print(name, finding)
        if failed:
            self._failed.append(name)
        return found

    def hold(self) -> bool:
        """Print how it ended, and return whether nothing failed."""
        wrong = f"{len(self._failed)} FAILED: {', '.join(self._failed)}"
        self._print("check", wrong if self._failed else "all hold")
        return not self._failed

    def _print(self, name: str, finding: str) -> None:
        if jax.process_index() == 0:
            print(name.ljust(_COLUMN) + finding.replace("\n", "\n" + " " * _COLUMN), flush=True)
