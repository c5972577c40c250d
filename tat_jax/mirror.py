"""A run whose folder lies in a bucket: it works in a folder of this machine, which is copied as it grows.

Orbax and all else write files as ever. What lies in the bucket is a run at every moment: rows come before
the checkpoints that go with them, and the file that makes a checkpoint whole comes last. Each process has a
folder of its own, as machines that share a bucket share no disk; process 0 alone saves and copies.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import jax
from jax.experimental import multihost_utils

from tat_jax import bucket_lock, paths
from tat_jax.bucket_lock import BucketLock, LostError
from tat_jax.buckets import Bucket, Place, side_by_side
from tat_jax.run_folder import only_run
from tat_jax.signals import Interrupted
from tat_jax.weights.remote import MARK, step_of, whole

_LOOK = 2.0  # seconds from one look for new checkpoints to the next
_ROWS = 60.0  # seconds after which rows without a checkpoint are copied
_PATIENCE = 600.0  # seconds without an answer of the bucket, after which the run ends
_STAYS = ("events", "damaged/", bucket_lock.NAME)  # what a run that continues has no need of

State: TypeAlias = tuple[int, int]  # of a file: its bytes, and when they were written


class Work(NamedTuple):
    """Where a run works.

    Attributes:
        folder: on this machine.
        is_shared: whether all processes have the same one.
        check: raises an OSError if it is lost, or its copy in a bucket is.
    """

    folder: Path
    is_shared: bool
    check: Callable[[], None]


@contextlib.contextmanager
def work_in(place: Place) -> Iterator[Work]:
    """Keep other runs out of a run's folder, and yield where this one works.

    Raises:
        OSError: it cannot be written or reached.
        ValueError: another run is at work in it.
    """
    if not isinstance(place, Bucket):
        with only_run(place) as check:
            yield Work(place, True, check)
        return
    with Mirror(place, scratch(place)) as mirror, only_run(mirror.folder) as check_is_there:

        def check() -> None:
            check_is_there()
            mirror.check()

        yield Work(mirror.folder, jax.process_count() == 1, check)


def scratch(bucket: Bucket) -> Path:
    """Return the folder of this process and machine in which a run in a bucket works.

    Raises:
        ValueError: this user has no home folder.
    """
    name = f"{bucket.name}-{hashlib.sha256(bucket.url.encode()).hexdigest()[:12]}-{jax.process_index()}"
    return paths.cache() / "runs" / name


class Mirror:
    """Bring a run from a bucket, and keep the bucket's copy up to date.

    Where the bucket does not answer the run goes on for ten minutes. Its own folder is removed in the end,
    unless there is something in it that could not be copied.

    Args:
        bucket: the run's folder.
        folder: that of this process; what is in it is removed.
    """

    def __init__(self, bucket: Bucket, folder: Path):
        self.folder = folder
        self._bucket = bucket
        self._writes = jax.process_index() == 0
        self._sent: dict[str, State] = {}
        self._failure: Exception | None = None
        self._fails_since = float("inf")
        self._copied = time.monotonic()
        self._ended = threading.Event()
        self._copying = threading.Thread(target=self._copy_again, daemon=True)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            if self._writes:
                self._lock = opened.enter_context(BucketLock(self._bucket))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("the bucket is locked")
            self._fetch()
            self._open = opened.pop_all()
        if self._writes:
            self._copying.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if self._writes:
                self._ended.set()
                self._copying.join()
                try:
                    self._copy_to_the_end(patient=error is None)
                except OSError as failure:
                    left = f"{failure}; what was not copied lies in {self.folder} until the next start"
                    if error is None or isinstance(error, Interrupted):
                        raise OSError(left) from failure
                    print(left, file=sys.stderr)
                    return
            shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        """Raise an OSError if the bucket has not answered for ten minutes, or another run took it over."""
        if self._failure and self._is_final(self._failure):
            raise self._failure

    def _is_final(self, failure: Exception) -> bool:
        return isinstance(failure, LostError) or time.monotonic() - self._fails_since > _PATIENCE

    def _fetch(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        there = self._bucket.objects()
        kept = whole(there)
        self._bucket.fetch({n: e for n, e in kept.items() if not n.startswith(_STAYS)}, self.folder)
        self._sent = self._files()
        if self._writes:
            self._bucket.delete(there.keys() - kept.keys())

    def _copy_again(self) -> None:
        """Copy while the run works, when there is a new checkpoint, and now and then rows."""
        while not self._ended.wait(_LOOK):
            try:
                files = self._files()
                is_due = time.monotonic() - self._copied > _ROWS and files != self._sent
                marks = {name: state for name, state in files.items() if name.endswith(MARK)}
                if is_due or marks.items() - self._sent.items():
                    self._copy()
            except Exception as failure:  # whatever it is, the run is to know of it
                if self._failure is None:
                    print(f"{failure}; the run goes on, and copies again", file=sys.stderr)
                self._note(failure)

    def _note(self, failure: Exception | None) -> None:
        """Note that copying failed, or that it did not."""
        self._failure = failure
        self._fails_since = min(self._fails_since, time.monotonic()) if failure else float("inf")

    def _copy_to_the_end(self, *, patient: bool) -> None:
        """Copy what is left, and try for ten minutes if `patient`.

        Raises:
            OSError: the bucket does not take it.
        """
        self.check()
        while True:
            try:
                return self._copy()
            except OSError as failure:
                self._note(failure)
                if not patient or self._is_final(failure):
                    raise
                time.sleep(_LOOK)

    def _copy(self) -> None:
        """Make the bucket's folder what this one is."""
        self._lock.renew()
        files = self._files()
        changed = [name for name, state in files.items() if self._sent.get(name) != state]
        gone = [name for name in self._sent if name not in files]
        # A checkpoint that was saved anew is none until all of it is there.
        self._delete(name for name in changed if name.endswith(MARK))
        of_checkpoints = [name for name in changed if step_of(name) is not None]
        self._write(files, [name for name in changed if step_of(name) is None])
        lost = self._write(files, [name for name in of_checkpoints if not name.endswith(MARK)])
        self._write(
            files, [name for name in of_checkpoints if name.endswith(MARK) and step_of(name) not in lost]
        )
        self._delete(sorted(gone, key=lambda name: not name.endswith(MARK)))
        self._note(None)
        self._copied = time.monotonic()

    def _write(self, files: dict[str, State], names: list[str]) -> set[int | None]:
        """Copy files, and return the steps of those that are gone meanwhile, as Orbax removes old ones."""
        lost: set[int | None] = set()

        def write(name: str) -> None:
            file, step = self.folder / name, step_of(name)
            try:
                # Rows are written meanwhile; a file of a checkpoint stays as it is, and may be large.
                self._bucket.write(name, file.read_bytes() if step is None else file)
            except FileNotFoundError:
                if file.exists():
                    raise
                lost.add(step)
            else:
                self._sent[name] = files[name]

        side_by_side(write, names)
        return lost

    def _delete(self, names: Iterable[str]) -> None:
        names = [name for name in names if name in self._sent]
        self._bucket.delete(names)
        for name in names:
            del self._sent[name]

    def _files(self) -> dict[str, State]:
        """Return the files that belong to a run by name, without what is being written."""
        found: dict[str, State] = {}
        for here, _, names in os.walk(self.folder):  # it passes over what Orbax moves and removes meanwhile
            for file in (Path(here, name) for name in names):
                name = str(file.relative_to(self.folder))
                is_partial = name.startswith("checkpoints/") and step_of(name) is None
                if is_partial or name.startswith("tmp") or name.endswith(".tmp") or name == "lock":
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[name] = (file.stat().st_size, file.stat().st_mtime_ns)
        return whole(found)
