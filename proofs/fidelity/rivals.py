"""The rivals of TaT beside the figures recorded of their authors' own code.

`python -m proofs.fidelity.rivals FILE` checks every loss, network and training in a file of the kind of
tests/golden/rivals.json; a part that a file has not is passed over.
"""

import json
import sys
from pathlib import Path

from proofs.fidelity import rival_losses, rival_memory, rival_networks, rival_trajectories
from proofs.fidelity.claim import Claim, check_files
from proofs.program import ROOT

GOLDEN = ROOT / "tests" / "golden" / "rivals.json"


def claims(file: Path = GOLDEN) -> list[Claim]:
    """Compare everything that a file holds."""
    said = json.loads(file.read_text())
    # Names and shapes of networks that a file of another kind of figures leaves to this one.
    keys = json.loads(GOLDEN.read_text())["network_keys"] | said.get("network_keys", {})
    figures = {"losses": [], "networks": [], "trajectories": [], **said, "network_keys": keys}
    of_losses = {"losses": list(rival_memory.steps(figures["losses"]))}
    methods = rival_losses.METHODS | rival_memory.METHODS
    return [
        *rival_losses.claims(of_losses, methods),
        *rival_networks.claims(figures),
        *rival_trajectories.claims(figures),
    ]


if __name__ == "__main__":
    check_files(claims, sys.argv[1:] or [GOLDEN])
