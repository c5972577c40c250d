"""The proof that this computes what the published code computes: `make fidelity`."""
