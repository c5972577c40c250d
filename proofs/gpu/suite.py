"""The tests of what a GPU computes, run on one."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from proofs.program import ROOT

# Other tests are of what no device computes, or need several.
FILES = ("losses", "losses_of_ones_own", "fitnet", "tat", "patches", "resnet", "optim")
# Other versions than ours warn of other things; pytest-benchmark, where it is, of several workers.
_HERE = ("-W", "default", "-p", "no:benchmark", "-p", "no:cacheprovider")
# PyTorch's float32 on a CPU is what they compare with, not TF32.
_ENVIRONMENT = {"TAT_JAX_TEST_PLATFORMS": "cuda,cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


class Tested(NamedTuple):
    """One line of the table.

    Attributes:
        file: of tests.
        passed: how many.
        failed: the names of those that did not.
        skipped: how many.
    """

    file: str
    passed: int
    failed: tuple[str, ...]
    skipped: int

    @property
    def holds(self) -> bool:
        """Return whether some passed and none failed."""
        return self.passed > 0 and not self.failed

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""
        return {
            "tests": self.file,
            "passed": str(self.passed),
            "failed": ", ".join(self.failed) or "0",
            "skipped": str(self.skipped),
        }


def results(files: tuple[str, ...] = FILES, environment: dict[str, str] = _ENVIRONMENT) -> list[Tested]:
    """Run the files, and return a line for each."""
    names = [f"tests/test_{file}.py" for file in files]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", f"--junitxml={report}", *names]
        workers = f"-n={min(8, os.cpu_count() or 1)}"
        done = subprocess.run(
            [*command, workers, *_HERE],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return [_line(name, cases) for name in names]


def _line(name: str, cases: list[ElementTree.Element]) -> Tested:
    module = name.removesuffix(".py").replace("/", ".")
    own = [case for case in cases if f"{case.get('classname')}.".startswith(f"{module}.")]
    outcome = Counter[str]()
    failed = []
    for case in own:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(str(case.get("name")))
        else:
            outcome["skipped" if case.find("skipped") is not None else "passed"] += 1
    return Tested(name, outcome["passed"], tuple(failed), outcome["skipped"])
