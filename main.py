"""Distil a network: `python main.py --config configs/r18_r34.py`; without a config, a demonstration.

The installed command `tat-jax` is the same.
"""

from tat_jax import signals

if __name__ == "__main__":
    signals.act_at_once()  # while all else is imported, too

    from tat_jax import cli

    cli.start()
