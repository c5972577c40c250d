"""Python of its own, for what must not depend on what the tests have imported; processes of this one."""

import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(code: str, *options: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, in which nothing is imported and no warning filter is pytest's."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parent.parent,
        check=True,
    )


def children() -> set[int]:
    """Return the processes that this one started and that are there."""
    return {
        int(child)
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    }
