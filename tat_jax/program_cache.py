"""Compiled programs, kept on a disk from one start to the next."""

import os
import sys

import jax

from tat_jax import failures, paths


def open_cache() -> None:
    """Keep compiled programs for the next start, where there is a place for them."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = paths.cache() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except (ValueError, OSError) as error:
        if jax.process_index() == 0:
            why = failures.explain(error)
            print(f"every start compiles anew: {why}; XDG_CACHE_HOME names another folder", file=sys.stderr)
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
