"""A disk that is full, cannot be written, loses a folder, or changes a checkpoint."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import STEPS, Run, contents, differences, finish, small_config
from tat_jax import sharding
from tat_jax.build import build
from tat_jax.checkpoints import RunCheckpoints
from tat_jax.distill import TrainState
from tat_jax.weights import folders

EPOCHS = "--config.epochs=4"
# Room for no checkpoint, for part of the first, and for one or two.
SIZES = ("300k", "1m", "3m")
DAMAGES = ("one bit flipped", "cut in half", "emptied", "removed")
# In a name space of its own, which an ordinary user may have, too: as root, and with mounts of its own. What
# lies there afterwards is copied to where others see it.
_ISOLATED = ("unshare", "--map-root-user", "--mount", "sh", "-c")


def can_isolate() -> bool:
    """Return whether this machine lets its users mount in a name space of their own."""
    return subprocess.run([*_ISOLATED, "mount -t tmpfs none /mnt"], check=False).returncode == 0


def faults() -> list[Fault]:
    """Bring about every fault of the disk."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        finish(whole, EPOCHS)
        return [*run_faults(whole), *damaged_checkpoints(whole)]


def run_faults(whole: Path, *, sizes: Sequence[str] = SIZES) -> list[Fault]:
    """Bring about what a run meets.

    Args:
        whole: a run that met nothing.
        sizes: of disks that run full, as mount takes them.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = [_full(folder / size, whole, size) for size in sizes]
        found += [_read_only(folder / "read-only", whole), _deleted(folder / "deleted")]
        return [*found, _damaged_and_continued(folder / "continued", whole)]


def _full(folder: Path, whole: Path, size: str) -> Fault:
    """Run in a disk of a size until it is full, then make room and run on."""
    run = _run_isolated(folder, f"mount -t tmpfs -o size={size} none {folder}/disk")
    # Whichever comes first: a checkpoint that it cannot save, or another file that it cannot write.
    wrong = _refused(run, "error: cannot ", f" in {run.folder}", "No space left", "make room")
    kept = folders.steps(folder / "kept" / "run")
    finish(folder / "kept" / "run", EPOCHS)
    wrong += differences(folder / "kept" / "run", whole)
    lost = f"nothing; continued from step {kept[-1] if kept else 0}"
    return judge(f"disk of {size}B full while saving, then room", 1, wrong, lost)


def _read_only(folder: Path, whole: Path) -> Fault:
    """Run into a folder that cannot be written, new and continued."""
    new = _run_isolated(folder, f"mount -t tmpfs -o ro none {folder}/disk")
    wrong = _refused(new, "cannot write in", "Read-only file system", "another --workdir")
    shutil.copytree(whole, folder / "disk" / "run")
    shutil.rmtree(folder / "disk" / "run" / "checkpoints" / str(4 * STEPS))
    before = contents(folder / "disk")
    bound = f"mount --bind {folder}/disk {folder}/disk && mount -o remount,ro,bind {folder}/disk"
    wrong += _refused(_run_isolated(folder, bound), "cannot write in", "Read-only file system")
    if contents(folder / "disk") != before:
        wrong.append("something was written")
    finish(folder / "disk" / "run", EPOCHS)
    wrong += differences(folder / "disk" / "run", whole)
    return judge("read-only folder, new or of a run, then writable", 2, wrong)


def _deleted(folder: Path) -> Fault:
    """Delete the folder of a run that is at work, in the middle of a save."""
    run = Run(folder / "run", "--config.epochs=1000")
    run.wait_until(lambda: folders.steps(run.folder), "a checkpoint")
    run.wait_until(lambda: any((run.folder / "checkpoints").glob("*tmp*")), "a save")
    run.folder.rename(folder / "moved")  # gone at once, as no deletion is
    shutil.rmtree(folder / "moved")
    run.wait()
    wrong = _refused(run, "was moved or deleted")
    if folders.steps(run.folder):
        wrong.append("a checkpoint was written in its place")
    return judge("folder deleted while saving", 1, wrong, "what was deleted")


def _damaged_and_continued(folder: Path, whole: Path) -> Fault:
    """Flip a bit in the arrays of the latest checkpoint, and run on."""
    shutil.copytree(whole, folder)
    latest = folder / "checkpoints" / str(folders.steps(folder)[-1])
    arrays = max((latest / "training").rglob("*"), key=lambda path: path.stat().st_size)
    _damage(arrays, DAMAGES[0], np.random.default_rng(0))
    said = finish(folder, EPOCHS)
    wrong = differences(folder, whole)
    if not ("cannot be read" in said and (folder / "damaged" / latest.name).is_dir()):
        wrong.append("the damage was not told, or not kept")
    lost = f"nothing; {4 * STEPS - folders.steps(whole)[-2]} steps computed anew"
    return judge("bit flipped in a checkpoint, run again", 1, wrong, lost)


def damaged_checkpoints(whole: Path, *, files: int | None = None) -> list[Fault]:
    """Damage each file of the latest checkpoint of a run in each way, and read what is to be continued.

    What is read must be the latest state to the bit, or the one before, the damaged one being set aside.

    Args:
        whole: the run.
        files: how many of the largest are damaged, the arrays first; else all.
    """
    rng = np.random.default_rng(0)
    like = _like()
    good = {step: _read(whole, step, like) for step in folders.steps(whole)}
    *_, before, latest = good
    names = [path for path in sorted((whole / "checkpoints" / str(latest)).rglob("*")) if path.is_file()]
    names = sorted(names, key=lambda path: path.stat().st_size, reverse=True)[:files]
    found = []
    for damage in DAMAGES:
        survived, used_before = 0, 0
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                run = Path(temporary) / "run"
                shutil.copytree(whole, run)
                _damage(run / name.relative_to(whole), damage, rng)
                with RunCheckpoints(run) as checkpoints:
                    restored = checkpoints.restore(like)
                assert restored is not None
                step = int(restored.state.step)
                aside = (run / "damaged" / str(latest)).is_dir() and len(restored.set_aside) == 1
                survived += _same(restored.state, good[step]) and aside == (step == before)
                used_before += step == before
        lost = f"nothing; the one before was used {used_before} times, for the rest the file had no part"
        found.append(Fault(f"a file of a checkpoint {damage}", len(names), survived, lost))
    return found


def _damage(path: Path, damage: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    match damage:
        case "one bit flipped":
            if content:
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        case "cut in half":
            del content[len(content) // 2 :]
        case "emptied":
            content.clear()
        case _:
            path.unlink()
            return
    path.write_bytes(content)


def _run_isolated(folder: Path, mount: str) -> Run:
    """Run below `folder/disk` after a mount, and copy what is there afterwards to `folder/kept`."""
    (folder / "disk").mkdir(parents=True, exist_ok=True)
    kept = f"rm -rf {folder}/kept; cp -r {folder}/disk {folder}/kept"
    script = f'{mount} || exit 99; "$@"; code=$?; {kept}; exit $code'
    run = Run(
        folder / "disk" / "run",
        EPOCHS,
        prefix=(*_ISOLATED, script, "sh"),
        environment={"XDG_CACHE_HOME": str(folder.parent / "cache")},
        log=folder / f"{time.monotonic_ns()}.log",
    )
    run.wait()
    return run


def _refused(run: Run, *said: str) -> list[str]:
    """Return what is wrong with the end of a run that should have failed with an error of one line."""
    wrong = [] if run.process.returncode == 1 else [f"code {run.process.returncode}: {run.output[-300:]}"]
    wrong += [f"not said: {text}" for text in said if text not in run.output]
    if "Traceback" in run.output:
        wrong.append(f"a stack trace: {run.output.split('Traceback')[1][-1000:]}")
    return wrong


def _like() -> TrainState:
    """Return a state of the small run's shapes."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    return build(small_config(), mesh, num_classes=10, steps_per_epoch=STEPS).state


def _read(whole: Path, step: int, like: TrainState) -> TrainState:
    """Read the state of one of a run's checkpoints."""
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(whole / "checkpoints" / str(step), Path(temporary) / "checkpoints" / str(step))
        with RunCheckpoints(Path(temporary)) as checkpoints:
            restored = checkpoints.restore(like)
    assert restored is not None
    return restored.state


def _same(state: TrainState, other: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
