"""What a table of claims must show for a test to pass."""


def broken(claims):
    """Return the claims that do not hold, of which there is at least one that could."""
    assert any(claim.bound is not None for claim in claims)
    return [claim for claim in claims if not claim.holds]
