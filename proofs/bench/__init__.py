"""Ours and its rivals side by side: `make bench`."""
