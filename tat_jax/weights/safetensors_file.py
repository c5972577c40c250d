"""Read `.safetensors` files as NumPy arrays."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from tat_jax.weights.tensors import Entries, RefusedError

_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype("?"),
}
_MAX_HEADER = 1 << 24  # bytes; safetensors itself allows 100 MB, of which JSON makes gigabytes


def read_safetensors_file(path: Path) -> Entries:
    """Return the tensors of a file by name.

    Raises:
        RefusedError: it has more than a network's; a broken file raises anything.
    """
    content = path.read_bytes()
    if (header := int.from_bytes(content[:8], "little")) > _MAX_HEADER:
        raise RefusedError(f"refused, because its header claims {header:,} bytes")
    entries = {}
    for name, tensor in safetensors.deserialize(content):
        if tensor["dtype"] not in _TYPES:
            raise RefusedError(
                f"{name} is of type {tensor['dtype']}, which no network here has; save it as F32 or F16"
            )
        flat = np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]])
        entries[name] = flat.reshape(tensor["shape"])
    return entries
