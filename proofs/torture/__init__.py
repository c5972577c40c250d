"""Faults brought about on purpose, and what survives them: `make torture`."""
