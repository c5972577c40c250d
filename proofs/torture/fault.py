"""What was done to a run or a file, how often, how often that was survived, and what it cost."""

from collections.abc import Sequence
from typing import NamedTuple


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

    @property
    def holds(self) -> bool:
        """Return whether it was survived every time."""
        return self.survived == self.tried

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""
        return {
            "fault": self.fault,
            "tried": str(self.tried),
            "survived": str(self.survived),
            "lost": self.lost,
        }


def judge(fault: str, tried: int, wrong: Sequence[str], lost: str = "nothing") -> Fault:
    """Return the line of what was survived every time, with what it lost, or, if anything is wrong, never."""
    return Fault(fault, tried, 0 if wrong else tried, "; ".join(wrong) or lost)
