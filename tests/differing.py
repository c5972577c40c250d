"""What two processes are told that have not the same: each is `python -m tests.differing`."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tat_jax import sharding
from tat_jax.configs import r18_r34
from tat_jax.data.pipeline import check_same, open_pipeline


def config(**of_data: object) -> ConfigDict:
    """Return a config with changes of its `data`."""
    found = r18_r34.get_config("smoke")
    found.data.update(of_data)
    return found


def refusal(call: Callable[..., object], *arguments: object, **others: object) -> str:
    """Return what a call raises, or nothing."""
    try:
        call(*arguments, **others)
    except ValueError as error:
        return str(error)
    return ""


def answers() -> dict[str, str]:
    """Return what is answered to this process and another one, by what differs between them."""
    me, mesh = jax.process_index(), sharding.make_mesh()
    same, found = config(), open_pipeline(config(), "train")
    another = config()
    another.optimizer.learning_rate = 0.1 * me
    fewer = open_pipeline(config(labels_per_class=3 - me), "train")
    weights = {"keys": jax.random.key(0), "kernel": jnp.full((2, 3), float(me))}
    return {
        "nothing": refusal(check_same, same, found),
        "how each reads": refusal(check_same, config(root=f"/disk{me}", threads=me), found),
        "the config": refusal(check_same, another, found),
        "the images": refusal(check_same, same, fewer),
        "the weights": refusal(sharding.put_whole, weights, mesh, what="the weights"),
    }


def is_whole_everywhere() -> bool:
    """Return whether what is the same in both lies on every device as it was, keys of random streams too."""
    weights = {"keys": nnx.Rngs(3).params.key[...], "kernel": np.arange(6.0).reshape(2, 3)}
    placed = sharding.put_whole(weights, sharding.make_mesh(), what="the weights")
    drawn = jax.jit(jax.random.uniform)(placed["keys"])
    kernel = placed["kernel"]
    return (
        kernel.sharding.is_fully_replicated
        and len(kernel.sharding.device_set) == jax.device_count()
        and all(np.array_equal(shard.data, weights["kernel"]) for shard in kernel.addressable_shards)
        and float(drawn.addressable_data(0)) == float(jax.random.uniform(weights["keys"]))
    )


if __name__ == "__main__":
    sharding.start_processes()
    print(json.dumps({"refused": answers(), "whole": is_whole_everywhere()}))
