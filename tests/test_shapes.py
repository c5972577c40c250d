"""What signatures promise of shapes is checked in every test."""

from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from tat_jax.losses import kl_divergence

PACKAGE = Path(__file__).parents[1] / "tat_jax"


def test_a_call_that_breaks_a_promise_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="teacher_logits"):
        kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_every_module_that_promises_shapes_is_among_those_that_are_checked(pytestconfig):
    *checked, _ = pytestconfig.getoption("--jaxtyping-packages").split(",")
    promising = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in PACKAGE.rglob("*.py")
        if "from jaxtyping import" in file.read_text()
    }
    assert promising
    assert [name for name in promising if not name.startswith(tuple(checked))] == []
