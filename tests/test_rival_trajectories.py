"""The rivals' trainings are RepDistiller's, by our own train step."""

import json
import math
from pathlib import Path

from proofs.fidelity import rival_trajectories
from tests.claims import broken

FIGURES = json.loads((Path(__file__).parent / "golden" / "rivals.json").read_text())


def test_four_steps_of_crd_with_kd_are_those_recorded_of_the_authors_loop():
    # With most that can go wrong; `make fidelity PARTS=rivals` trains as all are.
    (run,) = [run for run in FIGURES["trajectories"] if run["method"] == "crd+kd"]
    assert broken(list(rival_trajectories.claims(FIGURES | {"trajectories": [run]}))) == []


def test_a_method_that_is_not_here_is_named():
    (claim,) = rival_trajectories.claims(FIGURES | {"trajectories": [{"id": "x/nst", "method": "nst"}]})
    assert claim.claim == "x/nst: nst is not here"
    assert math.isnan(claim.error)
    assert claim.bound is None
