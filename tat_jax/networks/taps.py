"""What a network sows and what its modules return, read by name while it runs, the network left as it is.

`nnx.capture` reads as much, but patches classes while it runs where modules return something, does not see a
`__call__` that a class inherits, and loses what is sown below an attribute under whose name something is
sown. Here each module of a copy of the network is given a class of its own, a subclass, that keeps both.
"""

import contextlib
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import errors, nnx
from jaxtyping import Array, Float

_KEPT = "kept_for_tat_jax"  # an attribute that no network has
_RETURNED = ""  # the name of what a module returned, beside those of what it sowed
_OUT_OF_SIGHT = "jax.checkpoint, jax.vmap or jax.lax.scan"

_HOLDS_OTHERS = (nnx.Pytree, list, tuple, Mapping)

Modules = Mapping[str, nnx.Module]


def modules_of(network: nnx.Module) -> dict[str, nnx.Module]:
    """Return a network and its modules by path, as in `blocks.3.mlp`; one that is shared has several."""
    return dict(_walk(network, "", ()))


def _walk(node: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, nnx.Module]]:
    if isinstance(node, nnx.Module):
        yield path, node
    above = (*above, id(node))
    for name, child in _children(node).items():
        if isinstance(child, _HOLDS_OTHERS) and id(child) not in above:
            yield from _walk(child, _join(path, name), above)


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, nnx.List | list | tuple):
        return {str(i): child for i, child in enumerate(node)}
    if isinstance(node, nnx.Dict | Mapping):
        return {str(name): child for name, child in node.items()}
    return vars(node)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextlib.contextmanager
def keeping(modules: Modules, tapped: Iterable[str]) -> Iterator[None]:
    """Let modules keep what they sow, and those of the paths in `tapped` what they return, from now on.

    Raises:
        ValueError: Flax does not let one keep anything where it runs.
    """
    returning = {id(modules[path]) for path in tapped if path in modules and callable(modules[path])}
    for module in modules.values():
        if not hasattr(module, _KEPT):
            # A variable, which Flax carries out of nnx.remat and nnx.jit as it does statistics.
            setattr(module, _KEPT, nnx.Variable({}))
            object.__setattr__(module, "__class__", _keeping(type(module), id(module) in returning))
    try:
        yield
    except Exception as error:  # Flax raises whatever JAX raises of a branch or an axis that differs.
        if _KEPT not in str(error):
            raise
        raise ValueError(
            "a module that is tapped or sows is called within nnx.cond, nnx.vmap or the like, which nothing "
            "leaves but by returning; tap a module around it"
        ) from error


@functools.cache  # so that networks of one kind have equal graph definitions
def _keeping(kind: type[nnx.Module], returning: bool) -> type[nnx.Module]:
    """Return a subclass that keeps what it sows, and if it is `returning` what it returns."""
    methods = {"sow": _sow, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if returning:
        methods["__call__"] = _returning(kind.__call__)
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(methods))


def _sow(
    module: nnx.Module,
    variable_type: type[nnx.Variable] | str,
    name: str,
    value: Any,
    reduce_fn: Callable[[Any, Any], Any] = lambda values, value: (*values, value),
    init_fn: Callable[[], Any] = tuple,
) -> bool:
    wanted = variable_type in (nnx.Intermediate, "intermediates")
    return wanted and _keep(module, name, lambda values: reduce_fn(values, value), init_fn)


def _returning(called: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(called)
    def call(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        output = called(module, *args, **kwargs)
        _keep(module, _RETURNED, lambda values: (*values, output), tuple)
        return output

    return call


def _keep(module: nnx.Module, name: str, add: Callable[[Any], Any], init: Callable[[], Any]) -> bool:
    """Keep a value, unless it is within a transformation of JAX, from which it could not be read."""
    kept = getattr(module, _KEPT)
    values = kept.get_value()
    try:
        kept.set_value({**values, name: add(values[name] if name in values else init())})
    except errors.TraceContextError:
        return False
    return True


def show(module: nnx.Module, **values: jax.Array) -> None:
    """Let whoever reads taps of the network see values by name; where nobody does, they are not kept.

    What is sown would hang on a module that is called by itself, and a trace of it would not be pure.
    """
    if hasattr(module, _KEPT):
        for name, value in values.items():
            module.sow(nnx.Intermediate, name, value)


def read(
    wanted: Iterable[str], modules: Modules, given: Mapping[str, Any], *, batch: int
) -> dict[str, Float[Array, "batch ..."]]:
    """Return all that a forward pass gave or sowed for each image, and what is wanted of its modules.

    Args:
        wanted: names that must be among them, or paths of modules.
        modules: those that kept what there is.
        given: what the pass returned itself, by name.
        batch: the number of images.

    Raises:
        ValueError: one that is wanted is not there, or not one array for each image.
    """
    there = _sown(modules) | {name: (value,) for name, value in given.items()}
    taps = {name: values[0] for name, values in there.items() if not _wrong(values, batch)}
    for name in wanted:
        if name in there:
            values = there[name]
        elif callable(modules.get(name)):
            values = getattr(modules[name], _KEPT).get_value().get(_RETURNED, ())
        else:
            raise ValueError(f"no tap {name}: {_instead(name, there, modules)}")
        if wrong := _wrong(values, batch):
            raise ValueError(f"no tap {name}: {wrong}")
        taps[name] = values[0]
    return taps


def _sown(modules: Modules) -> dict[str, tuple[Any, ...]]:
    return {
        _join(path, name): values if isinstance(values, tuple) else (values,)
        for path, module in modules.items()
        for name, values in getattr(module, _KEPT).get_value().items()
        if name != _RETURNED
    }


def _wrong(values: tuple[Any, ...], batch: int) -> str:
    """Return why values of a name are not one array for each image, or nothing."""
    if not values:
        return (
            "the network does not call it, or by another method than __call__, or within "
            f"{_OUT_OF_SIGHT}, which nothing leaves but by returning; tap a module around it"
        )
    if len(values) > 1:
        return f"there are {len(values)} of it in a forward pass; sow the one that is meant"
    if not isinstance(values[0], jax.Array):
        return f"it is a {type(values[0]).__name__}, not one array; sow the part that is meant"
    shape = values[0].shape
    return "" if shape[:1] == (batch,) else f"its shape {shape} does not begin with the {batch} images"


def _instead(name: str, sown: Iterable[str], modules: Modules) -> str:
    near = difflib.get_close_matches(name, [p for p, m in modules.items() if callable(m)], n=5, cutoff=0.5)
    return (
        f"the network sows {', '.join(sown) or 'nothing'}, and "
        + (f"the nearest of its modules are {', '.join(near)}" if near else "none of its modules is near")
        + f"; what is sown within {_OUT_OF_SIGHT} is not seen"
    )
