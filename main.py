"""Distil a network: `python main.py --config configs/r18_r34.py`; without a config, a demonstration.

The installed command `tat-jax` is the same.
"""

from tat_jax.cli import start

if __name__ == "__main__":
    start()
