"""Python of its own, for what must not depend on what the tests have imported."""

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
        timeout=120,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
