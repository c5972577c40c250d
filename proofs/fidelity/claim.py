"""What is claimed, compared with what, how far off it was measured to be, and how far it may be."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from proofs.report import table


class Claim(NamedTuple):
    """One line of the table.

    Attributes:
        claim: what holds.
        reference: what it was compared with.
        error: the largest error measured; what it is an error of stands in the claim.
        bound: the largest error allowed; None for a figure that is only reported.
    """

    claim: str
    reference: str
    error: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Return whether the error is within the bound; NaN never is."""
        return self.bound is None or self.error <= self.bound

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""
        bound, mark = "reported", ""
        if self.bound is not None:
            bound, mark = f"{self.bound:.2g}", "holds" if self.holds else "BROKEN"
        return {
            "claim": self.claim,
            "reference": self.reference,
            "measured error": f"{self.error:.2g}",
            "bound": bound,
            "": mark,
        }


def check_files(claims: Callable[[Path], Sequence[Claim]], files: Sequence[str | Path]) -> NoReturn:
    """Print the claims of files of recorded figures, and exit with 1 if a bound is broken."""
    found = [claim for file in files for claim in claims(Path(file))]
    print(table(found))
    sys.exit(not all(claim.holds for claim in found))
