"""How far numbers lie apart, and how far rounding alone takes losses."""

import numpy as np
from numpy.typing import ArrayLike

# At the published rate Adam makes steps of gradients that are 0 but for rounding, and what differs between
# two runs by 1e-15 at the second step does so by 1e-5 at the seventh. At this one it stays rounding.
RATE = "--config.optimizer.learning_rate=1e-6"
# Relative, at that rate.
SINGLE, DOUBLE = 5e-6, 1e-13


def relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """Return ‖ours − reference‖ / ‖reference‖, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def largest_relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """Return max |ours − reference| / |reference| over the elements, in float64; ∞ for another shape."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        return float("inf")
    return float(np.max(np.abs(ours - reference) / np.abs(reference)))
