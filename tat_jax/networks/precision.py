"""What is kept exact, and weights that lie in memory in fewer bits than their network computes with."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

_OWN = "dtype_of_its_own"  # of a variable that lies in fewer bits: the type that a network knows it in


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Return the type in which parameters, statistics and losses of `dtype` activations are kept."""
    return jnp.promote_types(dtype, jnp.float32)


def narrow(module: nnx.Module, dtype: DTypeLike) -> None:
    """Round the kernels of a module to a type of fewer bits, in which they lie from now on.

    A `View` hands them to its network in the type that they had. Vectors stay as they are: biases, what
    norms scale by, running statistics; a thousandth of the memory, whose rounding every position would feel.
    """
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable) and _is_kernel(variable):
            value = variable.get_value()
            if value.dtype.itemsize > jnp.dtype(dtype).itemsize:
                variable.set_metadata(_OWN, value.dtype)
                variable.set_value(value.astype(dtype))


def widened(state: nnx.State) -> nnx.State:
    """Return a network's state as the network knows it, where some of it lies in fewer bits."""

    def wide(variable: nnx.Variable) -> nnx.Variable:
        if not variable.has_metadata(_OWN):
            return variable
        own = variable.replace(variable.get_value().astype(variable.get_metadata(_OWN)))
        own.del_metadata(_OWN)
        return own

    return jax.tree.map(wide, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _is_kernel(variable: nnx.Variable) -> bool:
    value = variable.get_value()
    return (
        not isinstance(variable, nnx.BatchStat)
        and isinstance(value, jax.Array)
        and value.ndim > 1
        and jnp.issubdtype(value.dtype, jnp.floating)
    )
