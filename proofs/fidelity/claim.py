"""What is claimed, compared with what, how far off it was measured to be, and how far it may be."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from proofs.fidelity.report import markdown_table


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


def relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """Return ‖ours − reference‖ / ‖reference‖, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def largest_relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """Return max |ours − reference| / |reference| over the elements, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.max(np.abs(ours - reference) / np.abs(reference)))


def table(claims: list[Claim]) -> str:
    """Return the claims as a Markdown table."""
    rows = [("claim", "reference", "measured error", "bound", "")]
    for c in claims:
        bound = ("reported", "") if c.bound is None else (f"{c.bound:.2g}", "holds" if c.holds else "BROKEN")
        rows.append((c.claim, c.reference, f"{c.error:.2g}", *bound))
    return markdown_table(rows)
