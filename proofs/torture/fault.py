"""What was done to a run or a file, how often, how often that was survived, and what it cost."""

from collections.abc import Sequence
from typing import NamedTuple

from proofs.fidelity.report import markdown_table


class Fault(NamedTuple):
    """One line of the table.

    Attributes:
        fault: what was done.
        tried: how often.
        survived: how often all that must hold afterwards held.
        lost: what that cost at worst, as in "nothing" or "7 steps, computed anew".
    """

    fault: str
    tried: int
    survived: int
    lost: str


def table(faults: Sequence[Fault]) -> str:
    """Return the faults as a Markdown table."""
    rows = [("fault", "tried", "survived", "lost")]
    return markdown_table(rows + [(f.fault, str(f.tried), str(f.survived), f.lost) for f in faults])
