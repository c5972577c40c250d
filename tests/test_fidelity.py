"""What `make fidelity` proves at length, in short."""

import pytest

from fidelity import trajectories
from fidelity.claim import Claim, table


@pytest.mark.parametrize("run", trajectories.recorded(), ids=lambda run: run["id"])
def test_training_reproduces_the_runs_recorded_from_the_published_code(run):
    claims = trajectories.claims_in_float64(run)
    assert len(claims) == 7
    assert [claim for claim in claims if not claim.holds] == []


def test_a_broken_claim_is_named_and_nan_never_holds():
    claims = [Claim("a", "b", 2e-3, 1e-3), Claim("c", "d", float("nan"), 1.0), Claim("e", "f", 1.0, None)]
    assert [claim.holds for claim in claims] == [False, False, True]
    assert table(claims).count("BROKEN") == 2
