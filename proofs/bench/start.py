"""From `python main.py` to the end of the first step of `r18_r34`: with XLA's compilation cache, and without.

`python -m proofs.bench.start [--json FILE]`. Batch 16, random weights, embedded digits at 224². A run in an
empty cache folder and one after it, in turns.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proofs.bench.sidebyside import Row, compare, compare_times, main
from proofs.program import ROOT, Program, main_command

OPTIONS = (
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.data.source=digits",
    "--config.student.weights=random",
    "--config.teacher.weights=random",
)


def measure() -> list[Row]:
    """Compare warm with cold, and --help with Python's own start."""
    with tempfile.TemporaryDirectory() as caches:
        used: list[str] = []

        def cold() -> float:
            used.append(tempfile.mkdtemp(dir=caches))
            return first_step(used[-1])

        cold()  # before a warm one, and so that all of Python's own files are at hand
        return [
            compare(
                "first step, warm beside cold",
                lambda: first_step(used[-1]),
                cold,
                bound=3,
                warm_up=False,
                seconds=120,
            ),
            compare_times(
                "--help, beside python -c ''",
                lambda: _python(str(ROOT / "main.py"), "--help"),
                lambda: _python("-c", ""),
                bound=None,
            ),
        ]


def first_step(cache: str) -> float:
    """Return the seconds from the start of a run to the row that its first step logs; then kill it.

    Raises:
        RuntimeError: the run ended before.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        rows = folder / "metrics.jsonl"
        start = time.perf_counter()
        run = Program(
            main_command("r18_r34.py", folder, *OPTIONS),
            Path(temporary) / "log",
            environment={"XDG_CACHE_HOME": cache},
        )
        try:
            run.wait_until(lambda: rows.exists() and rows.stat().st_size, "its first step")
            return time.perf_counter() - start
        finally:
            run.kill()


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main(__doc__, measure)
