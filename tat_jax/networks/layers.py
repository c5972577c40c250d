"""Layers with PyTorch's constants: convolution, normalisation and their initialisations."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Where
from tat_jax.networks.depthwise import depthwise_conv
from tat_jax.networks.precision import at_least_float32


def _drawn_on_host(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> nnx.Initializer:
    """Return an initialiser that draws with NumPy.

    With jax.random, every shape of a network compiles a program of its own, for ten seconds and more in all.
    """

    def initialize(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        def array(data: Array) -> np.ndarray:
            return draw(np.random.default_rng(np.asarray(data)), shape).astype(dtype)

        data = jax.random.key_data(key)
        if isinstance(data, jax.core.Tracer):
            return jax.pure_callback(array, jax.ShapeDtypeStruct(shape, dtype), data)
        return jnp.asarray(array(data))  # a callback would be a program of its own, too

    return initialize


@functools.cache
def normal(deviation: float) -> nnx.Initializer:
    """Return an initialiser that draws from a normal distribution of mean 0."""
    return _drawn_on_host(lambda rng, shape: rng.normal(0, deviation, shape))


@functools.cache  # so that networks of one kind have equal graph definitions, and compile once
def uniform(bound: float) -> nnx.Initializer:
    """Return an initialiser that draws uniformly from ±`bound`."""
    return _drawn_on_host(lambda rng, shape: rng.uniform(-bound, bound, shape))


# torchvision's kaiming_normal_(mode="fan_out", nonlinearity="relu"), on kernels [height, width, in, out].
he_normal = _drawn_on_host(lambda rng, s: rng.normal(0, math.sqrt(2 / (s[0] * s[1] * s[3])), s))
# kaiming_normal_ as PyTorch has it by default, mode="fan_in".
he_normal_by_inputs = _drawn_on_host(lambda rng, s: rng.normal(0, math.sqrt(2 / math.prod(s[:-1])), s))
# PyTorch's default for convolutions and linear layers: uniform in ±1/sqrt(fan_in).
torch_uniform = _drawn_on_host(lambda rng, s: rng.uniform(-1, 1, s) / math.sqrt(math.prod(s[:-1])))


class BatchNorm(nnx.Module):
    """Normalise every channel by its mean and variance over groups of `group` images.

    y = (x − E[x]) / sqrt(Var[x] + 1e-5) · scale + bias, computed in float32 at least. In training, E and Var
    are those of each group of `group` consecutive images (None: the whole batch), so that the statistics do
    not depend on the number of devices; PyTorch's DistributedDataParallel takes them over one device's
    images. Running statistics follow the first group, as DistributedDataParallel's follow its first process,
    with PyTorch's momentum of 0.1 and its unbiased variance.
    """

    epsilon: ClassVar[float] = 1e-5
    momentum: ClassVar[float] = 0.1

    def __init__(self, features: int, *, group: int | None = None, dtype: DTypeLike = jnp.float32):
        param_dtype = at_least_float32(dtype)
        self.group = group
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, param_dtype))

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """Return `x` normalised, in `x`'s type; in training, also update the running statistics.

        Args:
            x: activations.
            train: use the batch's statistics instead of the running ones.
            where: the images that count. Others are normalised, but do not enter the statistics.

        Raises:
            ValueError: the batch is not a whole number of groups.
        """
        batch = len(x)
        group = min(self.group or batch, batch) if train else batch
        if batch % group:
            raise ValueError(f"bn_group={group} does not divide the batch of {batch} images")
        y = rearrange(x.astype(at_least_float32(x.dtype)), "(g n) h w c -> g n h w c", n=group)
        if train:
            # On a TPU both statistics are sums of one pass; about the running mean they round well.
            origin = jax.lax.platform_dependent(self.mean[...], tpu=lambda mean: mean, default=jnp.zeros_like)
            y -= rearrange(jax.lax.stop_gradient(origin), "c -> 1 1 1 1 c")
            mean, var, count = _statistics(y, where)
            self._update_running(mean + origin[None], var, count, where)
        else:
            mean, var = self.mean[...][None], self.var[...][None]
        factor = jax.lax.rsqrt(var + self.epsilon) * self.scale[...][None]
        mean, factor, bias = (rearrange(v, "g c -> g 1 1 1 c") for v in (mean, factor, self.bias[...][None]))
        return rearrange((y - mean) * factor + bias, "g n h w c -> (g n) h w c").astype(x.dtype)

    def _update_running(
        self,
        mean: Float[Array, "g c"],
        var: Float[Array, "g c"],
        count: Float[Array, " g"],
        where: Where | None,
    ) -> None:
        """Let running statistics follow those of the groups: of the first."""
        mean, var, count = mean[0], var[0], count[0]
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            running[...] = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(new)


def _statistics(
    x: Float[Array, "g n h w c"], where: Where | None
) -> tuple[Float[Array, "g c"], Float[Array, "g c"], Float[Array, " g"]]:
    """Return the mean, the biased variance and the number of samples of each group, per channel."""
    if where is None:
        weight = jnp.ones(x.shape[:2], x.dtype)
    else:
        valid = rearrange(jnp.asarray(where), "(g n) -> g n", n=x.shape[1])
        # A group of padding alone keeps finite statistics (its own), or 0 · inf would poison the gradient.
        weight = (valid | ~valid.any(1, keepdims=True)).astype(x.dtype)
    count = reduce(weight, "g n -> g", "sum") * x.shape[2] * x.shape[3]
    weight = rearrange(weight, "g n -> g n 1 1 1")
    mean = reduce(x * weight, "g n h w c -> g c", "sum") / count[:, None]
    # The variance's gradient by the mean, a sum of deviations, is zero: without it the backward pass reads
    # activations once less. On a CPU it stays, so that runs of before continue bit by bit. A TPU takes
    # E[x²] − E[x]², which does not wait for the mean.
    centre = jax.lax.platform_dependent(
        mean, cpu=lambda mean: mean, tpu=jnp.zeros_like, default=jax.lax.stop_gradient
    )
    deviation = x - rearrange(centre, "g c -> g 1 1 1 c")
    var = reduce(deviation**2 * weight, "g n h w c -> g c", "sum") / count[:, None]
    var = jax.lax.platform_dependent(
        var, mean, tpu=lambda var, mean: jnp.maximum(var - mean**2, 0), default=lambda var, _: var
    )
    return mean, var, count


class LayerNorm(nnx.LayerNorm):
    """Normalise the channels of each position, in float32 at least; returned in the type of what it reads."""

    def __init__(self, channels: int, *, epsilon: float = 1e-6, dtype: DTypeLike, rngs: nnx.Rngs):
        exact = at_least_float32(dtype)
        super().__init__(
            channels, epsilon=epsilon, dtype=exact, param_dtype=exact, use_fast_variance=False, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "*positions channels"], *, mask: Array | None = None
    ) -> Float[Array, "*positions channels"]:
        """Return (x − E[x]) / sqrt(Var[x] + epsilon) · scale + bias."""
        return super().__call__(x, mask=mask).astype(x.dtype)


def conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padded: bool = True,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    kernel_init: nnx.Initializer = he_normal,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Make a size×size convolution, if `padded` by dilation · (size // 2) on every side.

    A bias starts as zeros.
    """
    padding = dilation * (size // 2) if padded else 0
    depthwise = groups == in_features == out_features
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=stride,
        padding=((padding, padding),) * 2,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        conv_general_dilated=depthwise_conv if depthwise else jax.lax.conv_general_dilated,
        kernel_init=kernel_init,
        rngs=rngs,
    )


class ConvNorm(nnx.List):
    """A convolution, made as by `conv`, and its normalisation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        **of_conv: Any,
    ):
        norm = BatchNorm(out_features, group=bn_group, dtype=dtype)
        super().__init__([conv(in_features, out_features, size, dtype=dtype, **of_conv), norm])

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool, where: Where | None
    ) -> Float[Array, "batch h w c"]:
        convolution, norm = self
        return norm(convolution(x), train=train, where=where)


def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return min(max(x, 0), 6), whose gradient at 0 and at 6 is 0 as in PyTorch; `nnx.relu6` halves it."""
    return jnp.where((x > 0) & (x < 6), x, jnp.clip(jax.lax.stop_gradient(x), 0, 6))
