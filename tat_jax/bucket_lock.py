"""One run at a time in a bucket, where nothing is locked: an object that whoever works there renews.

Every write of it is conditional on the version before, so that of several who want it one gets it, and who
lost it learns that before the next write. No clocks are compared.
"""

import contextlib
import getpass
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tat_jax.buckets import Bucket, Stamp

NAME = "lock.json"
_BEAT = 15.0  # seconds from one renewal to the next
_STALE = 60.0  # seconds without one, after which another run takes over


class LostError(OSError):
    """Another run has taken over what this one worked in."""


class BucketLock:
    """Keep other runs out of a folder in a bucket.

    A lock that is there is watched: if it is renewed, another run is at work. If not for a minute, it is
    taken over; at once if its process is known to be gone from this machine.

    Args:
        bucket: the folder.
        beat: seconds from one renewal to the next.
        stale: seconds without one, after which a lock is taken over.
    """

    def __init__(self, bucket: Bucket, *, beat: float = _BEAT, stale: float = _STALE):
        self._bucket, self._beat, self._stale = bucket, beat, stale
        self._said: dict[str, Any] = {
            "owner": f"{getpass.getuser()}@{socket.gethostname()}, process {os.getpid()}",
            "process": _process(os.getpid()),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._ended = threading.Event()
        self._one = threading.Lock()
        self._beating = threading.Thread(target=self._renew_again, daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ValueError: another run is at work.
            OSError: the bucket cannot be reached.
        """
        self._stamp = self._take()
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beating.join(1)  # it may wait for an answer
        if isinstance(error, OSError):
            return  # the bucket did not answer, or belongs to another run
        with contextlib.suppress(OSError):  # it becomes stale by itself
            self.renew()
            self._bucket.delete([NAME])

    def renew(self) -> None:
        """Say that this run is still at work.

        Raises:
            LostError: another run has taken over.
            OSError: the bucket cannot be reached.
        """
        with self._one:
            try:
                self._stamp = self._write(self._stamp)
            except FileExistsError:
                raise LostError(
                    f"another run has taken over {self._bucket}, as this one was not heard of for a minute"
                ) from None

    def _renew_again(self) -> None:
        while not self._ended.wait(self._beat):
            try:
                self.renew()
            except OSError:
                continue  # told by whatever is written next

    def _take(self) -> Stamp:
        seen: Stamp | None = None
        since = time.monotonic()
        while True:
            try:
                return self._write(None)
            except FileExistsError:
                pass
            try:
                said, stamp = self._read()
            except FileNotFoundError:  # released meanwhile
                continue
            if stamp != seen:
                if seen is not None:
                    raise ValueError(self._taken_by(said))
                seen, since = stamp, time.monotonic()
                if not _is_gone(said):
                    print(
                        f"{self._bucket} is locked by {said.get('owner', 'nobody known')}: waiting for up to "
                        f"{self._stale:.0f} s for a sign of life",
                        file=sys.stderr,
                    )
            if _is_gone(said) or time.monotonic() - since > self._stale:
                try:
                    return self._write(stamp)
                except FileExistsError:
                    raise ValueError(self._taken_by(self._read()[0])) from None
            time.sleep(self._beat / 5)

    def _taken_by(self, said: dict[str, Any]) -> str:
        owner = said.get("owner", "nobody known")
        return f"another run is at work in {self._bucket}: {owner}; choose another --workdir"

    def _write(self, before: Stamp | None) -> Stamp:
        self._said["beat"] += 1
        try:
            return self._bucket.write_instead(NAME, json.dumps(self._said).encode(), before)
        except FileExistsError:  # perhaps by this very request, whose answer got lost
            said, stamp = self._read()
            if said.get("token") == self._said["token"]:
                return stamp
            raise

    def _read(self) -> tuple[dict[str, Any], Stamp]:
        data, stamp = self._bucket.read_stamped(NAME)
        return said_by(data), stamp


def said_by(data: bytes) -> dict[str, Any]:
    """Return what a lock says; of one that is damaged, nothing."""
    try:
        said = json.loads(data)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _process(number: int) -> list[str] | None:
    """Return what tells a process from all others, on any machine; None where the system does not say it."""
    try:
        return [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
            str(number),
            Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19],  # when it was started
        ]
    except OSError:
        return None


def _is_gone(said: dict[str, Any]) -> bool:
    """Return whether the process that wrote a lock is known to have ended, as it ran on this machine."""
    process, own = said.get("process"), _process(os.getpid())
    if not process or not own or process[:2] != own[:2]:
        return False
    return _process(int(process[2])) != process
