"""What all tests share: eight simulated devices, exact types on request, and no silent broadcasting."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TAT_JAX_TEST_PLATFORMS", "cpu")  # `make gpu` says others
# Programs of tests run for a moment: most of their time is the compiler's, and LLVM's optimisations and the
# fusions that go through MLIR are two fifths of it. The proofs compile as users do.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
else:  # runs are to repeat each other to the bit
    os.environ["XLA_FLAGS"] += " --xla_gpu_deterministic_ops=true"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as it is in the workers, which so compile a program once
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tat_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping
import pytest

from tat_jax.buckets import Bucket
from tests.images import encode, photograph

jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what runs in its background deaf to Ctrl-C, which tests and what they start are to hear.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Compute in float64 where asked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Leave annotations unchecked.

    Where functions are to refuse shapes themselves; and in tests about runs, of whose time checks of every
    call for every image are a third, and are made where images are tested.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def folder(tmp_path):
    """Return a function that makes small images at the paths given, below a root, and returns the root."""

    def make(*paths: str) -> Path:
        for i, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(encode(photograph(12, 16, seed=i)))
        return tmp_path

    return make


@pytest.fixture(scope="session")
def stores():
    """Gives both stores, once for all tests."""
    from tests.emulator import Emulator  # here, as other tests have no need of its libraries

    emulator = Emulator()
    yield emulator
    emulator.close()


@pytest.fixture
def emulator(stores, monkeypatch, tmp_path):
    """Gives the stores, without objects and without faults, found by the environment."""
    for name in stores.names():
        stores.delete(name)
    stores.mend()
    for name, value in stores.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stores


@pytest.fixture(params=["s3", "gs"])
def bucket(request, emulator):
    """Gives a folder in a bucket of either store."""
    return Bucket(f"{request.param}://bucket/runs/a")
