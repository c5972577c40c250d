"""Quantities as a person reads them."""


def size(count: int) -> str:
    """Return so many bytes in MiB, or in GiB from one on."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """Return a time in the unit in which it is a number of one to three digits."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def count(number: int, one: str, several: str = "") -> str:
    """Return so many of something, as `1 step` or `20 steps`."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
