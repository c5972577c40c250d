"""Weights on disk: a network's own, and those of others under their names and in their files."""
