"""The networks a config names, with their weights: student and teacher, built alike.

Each other file of this folder that has `ARCHITECTURES` is a family of networks; none is named here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike
from ml_collections import ConfigDict

from tat_jax.buckets import Bucket, Place, place
from tat_jax.fields import FOLDER, Field, Fields, Rule, numbers, or_none, whole
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.view import View
from tat_jax.weights import folders, remote, store
from tat_jax.weights.store import StoredNetwork

OwnNetwork: TypeAlias = nnx.Module | Callable[..., nnx.Module]  # one of the user's, or what builds it
Entry: TypeAlias = ConfigDict | Mapping[str, Any]  # the `FIELDS` of one network
RANDOM = "random"  # weights drawn from the seed instead of read from a folder


def _found() -> dict[str, Architecture]:
    files = (importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__))
    return {name: found for file in files for name, found in getattr(file, "ARCHITECTURES", {}).items()}


ARCHITECTURES = _found()

_OF_FAMILIES = {name: field for found in ARCHITECTURES.values() for name, field in found.options.items()}
_OF_VIEW = {
    "mean": Field(
        tuple,
        or_none(numbers(3, "three numbers", lambda *_: True)),
        "of the channels of its images; None: the architecture's",
        none_is=lambda entry: list(find(entry["architecture"]).mean),
    ),
    "std": Field(
        tuple,
        or_none(numbers(3, "three numbers greater than 0", lambda *channels: min(channels) > 0)),
        "their standard deviation, like the mean in units of the full range of a pixel",
        none_is=lambda entry: list(find(entry["architecture"]).std),
    ),
    "image_size": Field(int, or_none(whole(1)), "to which images are resized for it; None: as they are"),
}
FIELDS: Fields = {
    "architecture": Field(
        "resnet18",
        Rule(" or ".join(map(repr, ARCHITECTURES)), lambda value: value in list(ARCHITECTURES)),
        "of the network",
    ),
    "weights": Field(
        RANDOM,
        FOLDER._replace(allowed=f"{FOLDER.allowed}; or {RANDOM!r}"),
        "a folder of converted weights, a run, or 'random'",
    ),
    **_OF_FAMILIES,
    **_OF_VIEW,
}


class Network(NamedTuple):
    """A network with its weights in place.

    Attributes:
        view: of the network.
        arguments: what builds it again: its architecture, its number of classes, its options, and what its
            view has that is not the default. Empty for a network of your own.
        origin: where its weights came from, as `source`; `head` is "trained", "random", "fresh" where its
            logits mean nothing yet, or "none" of a network without a head.
        usage: what is known of its images and its classes, see `usage.usage_of`; empty of random weights.
    """

    view: View
    arguments: dict[str, Any]
    origin: dict[str, str]
    usage: Mapping[str, Any] = MappingProxyType({})

    @property
    def has_trained_head(self) -> bool:
        """Return whether its logits count, as those of weights that are random on purpose do."""
        return self.origin["head"] not in ("fresh", store.NO_HEAD)

    @property
    def name(self) -> str:
        """Return what lines and pictures call it."""
        return self.arguments.get("architecture", type(self.view.network).__name__)


def build(
    entry: Entry,
    *,
    num_classes: int,
    dtype: DTypeLike,
    bn_group: int | None = None,
    seed: int,
    fit_head: bool,
) -> Network:
    """Build the network of a config's entry, with its weights.

    Args:
        entry: what a config says of the network.
        num_classes: of the data; 0 where it has no classes, for which a student needs no head.
        dtype: the type of activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        seed: what random weights are drawn from.
        fit_head: start a head that is missing, or has another number of classes than the data, afresh, as a
            student's, or leave it out where the data has none; otherwise the head stays as it is.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: they are another network's, or the architecture has no such option.
    """
    rngs = nnx.Rngs(seed)
    if entry["weights"] == RANDOM:
        arguments = _arguments(entry, num_classes)
        view = _view(arguments, dtype=dtype, bn_group=bn_group, rngs=rngs)
        head = "random" if num_classes else store.NO_HEAD
        return Network(view, arguments, {"head": head, "source": f"random weights, seed {seed}"})
    stored = _load(entry)
    source, of_head = entry["weights"], stored.arguments["num_classes"]
    arguments = _arguments(entry, num_classes if fit_head else of_head)
    view = _view(arguments, dtype=dtype, bn_group=bn_group, rngs=rngs)
    weights, origin = stored.weights, {**stored.origin, "source": source}
    if _is_backbone(stored, entry):
        if not fit_head:
            raise ValueError(
                f"{source} holds no {entry['architecture']}, but its backbone alone, "
                f"{stored.arguments['architecture']}: a student may start from it, a teacher may not"
            )
        weights, origin["head"] = _with_backbone(view.network, weights), "fresh"
    elif fit_head and (origin["head"] == "fresh" or of_head != num_classes):
        head = f"{find(arguments['architecture']).head}."
        weights = {path: value for path, value in weights.items() if not path.startswith(head)}
        weights |= _head(view.network, head)
        origin["head"] = "fresh"
    if not arguments["num_classes"]:
        origin["head"] = store.NO_HEAD
    store.set_weights(view.network, weights, source=source)
    return Network(view, arguments, origin, stored.usage)


def own(network: object, *, num_classes: int, seed: int) -> Network:
    """Return a network of the user's as one of ours: an nnx module, a `View` of one, or what builds either.

    Its logits count as trained. A function, or a class, is called as `build(num_classes=…, rngs=…)`.

    Raises:
        ValueError: it is no network.
    """
    if isinstance(network, Network):
        return network
    if not isinstance(network, nnx.Module) and callable(network):
        network = network(num_classes=num_classes, rngs=nnx.Rngs(seed))
    if not isinstance(network, nnx.Module):
        raise ValueError(f"a {type(network).__name__} is no network: it must be a flax.nnx module, or a View")
    view = network if isinstance(network, View) else View(network)
    return Network(view, {}, {"head": "trained", "source": "your own code"})


def restore(
    folder: str | Place, *, dtype: DTypeLike = "float32", network: OwnNetwork | None = None
) -> Network:
    """Build the network of a folder of converted weights, of a checkpoint, or the best one of a run.

    Args:
        folder: where it lies, on this machine or in a bucket.
        dtype: the type of activations.
        network: one of your own, as `own` takes it, in which the weights are then.

    Raises:
        FileNotFoundError: there is no network in `folder`.
        ValueError: what is there cannot be read, or is the weights of another network.
    """
    with remote.at_hand(place(folder)) as here:
        stored = store.load_network(folders.network_folder(here))
    if network is not None:
        return restore_own(stored, network, source=str(folder))
    view = _view(_known(stored, folder).arguments, dtype=dtype, rngs=nnx.Rngs(0))
    store.set_weights(view.network, stored.weights, source=str(folder))
    return Network(view, stored.arguments, {**stored.origin, "source": str(folder)}, stored.usage)


def restore_own(stored: StoredNetwork, network: OwnNetwork, *, source: str) -> Network:
    """Return a network of the user's, as `own` takes it, with weights that were read.

    Raises:
        ValueError: they are the weights of another network.
    """
    view = own(network, num_classes=stored.usage.get("num_classes", 1), seed=0).view
    store.set_weights(view.network, stored.weights, source=source)
    return Network(view, stored.arguments, {**stored.origin, "source": source}, stored.usage)


def construct(
    arguments: Mapping[str, Any],
    *,
    dtype: DTypeLike = jnp.float32,
    bn_group: int | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make the network of such arguments as `Network` has, with random weights.

    Raises:
        ValueError: there is no such architecture.
    """
    architecture = find(arguments["architecture"])
    options = {name: _said(name, arguments) for name in architecture.options}
    return architecture.build(
        num_classes=arguments["num_classes"], dtype=jnp.dtype(dtype), bn_group=bn_group, rngs=rngs, **options
    )


def find(architecture: str) -> Architecture:
    """Return the architecture of a name.

    Raises:
        ValueError: there is none.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def _known(stored: StoredNetwork, folder: str | Place) -> StoredNetwork:
    if not stored.arguments:
        raise ValueError(
            f"{folder} holds a network of your own; name what builds it, as --student=mine.py:build"
        )
    return stored


def _load(entry: Entry) -> StoredNetwork:
    """Read the network that an entry names, and check that it is the one it describes."""
    weights, architecture = entry["weights"], find(entry["architecture"])
    folder = place(weights)
    try:
        with remote.at_hand(folder) as here:
            stored = _known(store.load_network(folders.network_folder(here, entry["architecture"])), weights)
    except FileNotFoundError as error:
        if isinstance(folder, Bucket) or folder.exists():
            raise
        raise FileNotFoundError(
            f"no weights in {weights}; make them with: python -m tat_jax.convert "
            f"{entry['architecture']}{'' if architecture.published else ' --from FILE'} --to {weights}"
        ) from error
    described = _arguments(entry, stored.arguments["num_classes"])
    free = {"image_size", *architecture.free}  # the same weights fit any
    if _is_backbone(stored, entry):
        free |= {"architecture", *architecture.options} - find(
            stored.arguments["architecture"]
        ).options.keys()
    for name in {**described, **stored.arguments}:
        found, wanted = (_said(name, arguments) for arguments in (stored.arguments, described))
        if found != wanted and name not in free:
            raise ValueError(f"{weights} holds a network of {name}={found}, the config has {wanted}")
    return stored


def _is_backbone(stored: StoredNetwork, entry: Entry) -> bool:
    return stored.arguments["architecture"] == find(entry["architecture"]).backbone


def _with_backbone(network: nnx.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a network, its backbone's being those of the whole network that it is part of."""
    own = store.network_weights(network)
    below = {f"backbone.{path}": value for path, value in weights.items()}
    return own | {path: value for path, value in below.items() if path in own}


def _arguments(entry: Entry, num_classes: int) -> dict[str, Any]:
    """Return what builds the network of an entry, as JSON gives it back; of its view what is no default."""
    name = entry["architecture"]
    options = find(name).options
    for option in _OF_FAMILIES:
        default = _said(option, {})
        if option not in options and entry[option] != default:
            raise ValueError(f"{name} has no {option}, so that it must stay {default!r}")
    arguments = {"architecture": name, "num_classes": num_classes, **{key: entry[key] for key in options}}
    of_view = {key: _as_json(entry[key]) for key in _OF_VIEW if entry[key] is not None}
    return arguments | {key: value for key, value in of_view.items() if value != _said(key, arguments)}


def _said(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return what some arguments say of a field, or its default."""
    field = FIELDS.get(name)
    if name not in arguments and isinstance(field, Field) and field.none_is:
        return field.none_is(arguments)
    default = field.default if isinstance(field, Field) else None
    return arguments.get(name, None if isinstance(default, type) else _as_json(default))


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _view(
    arguments: Mapping[str, Any], *, dtype: DTypeLike, bn_group: int | None = None, rngs: nnx.Rngs
) -> View:
    network = construct(arguments, dtype=dtype, bn_group=bn_group, rngs=rngs)
    return View(network, **{name: _said(name, arguments) for name in _OF_VIEW})


def _head(network: nnx.Module, below: str) -> dict[str, Any]:
    return {path: value for path, value in store.network_weights(network).items() if path.startswith(below)}
