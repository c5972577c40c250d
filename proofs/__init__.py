"""That this computes what the published code computes, how fast, and what it survives."""
