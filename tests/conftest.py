"""What all tests share: eight simulated devices, exact types on request, and no silent broadcasting."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Compute in float64 where asked for."""
    with jax.enable_x64(True):
        yield
