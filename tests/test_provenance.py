"""A run goes on with the classes and the teacher with which it began; classes are compared where known."""

import jax.numpy as jnp
import pytest
from flax import nnx

from tat_jax import provenance
from tat_jax.networks import Network, own
from tat_jax.usage import other_classes
from tests.tiny import Tiny

NOW = {"classes": ["cat", "dog"], "teacher": "1" * 64, "versions": {"jax": "2"}}


def changes(folder="runs/mine", **before):
    return provenance.changes({**NOW, **before}, NOW, folder)


def test_what_did_not_change_is_not_told():
    assert changes() == []


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["a_dog", "cat"], "label 0 was 'a_dog', it is 'cat' now"),
        (["cat", "cow"], "label 1 was 'cow', it is 'dog' now"),
        (["cat", "dog", "fox"], "3 there, 2 now"),
        (["cat"], "1 there, 2 now"),
    ],
)
def test_other_classes_are_refused_by_the_first_that_differs(classes, told):
    with pytest.raises(ValueError, match=rf"runs/mine was trained on other classes: {told}; .*--workdir"):
        changes(classes=classes)


def test_another_teacher_is_refused_by_the_digest_of_its_weights():
    message = r"under another teacher: the SHA-256 of its weights was 22222222…, it is 11111111… now"
    with pytest.raises(ValueError, match=message):
        changes(teacher="2" * 64)


def test_another_version_of_the_code_is_told():
    assert changes(versions={"jax": "1"}) == ["jax: 1 there, 2 now"]


@pytest.mark.parametrize(
    "before", [{}, {"classes": None, "teacher": None}, {"classes": NOW["classes"], "teacher": None}]
)
def test_what_was_not_remembered_hinders_nothing(before):
    assert provenance.changes(before, NOW, "runs/mine") == []


def test_the_teacher_is_known_by_its_arrays_alone():
    def digest(change):
        state = nnx.state(Tiny(2, rngs=nnx.Rngs(0)), nnx.Param)
        state.fc.bias[...] = state.fc.bias[...] + jnp.float32(change)
        return provenance.provenance_of(None, state)["teacher"]

    assert digest(0) == digest(0) != digest(1e-7)


def network(**usage) -> Network:
    return own(Tiny(2, rngs=nnx.Rngs(0)), num_classes=5, seed=0)._replace(usage=usage)


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ({"num_classes": 2, "classes": ["cat", "dog"]}, ""),
        ({"num_classes": 2, "classes": None}, ""),
        ({}, ""),
        ({"num_classes": 3, "classes": ["cat", "dog", "fox"]}, "it knows 3 classes, the data 2"),
        ({"num_classes": 2, "classes": ["dog", "cat"]}, "its class 0 is 'dog', and that of the data 'cat'"),
    ],
)
def test_classes_are_compared_as_far_as_they_are_known(usage, told):
    assert other_classes(network(**usage), 2, ["cat", "dog"]) == told
    assert not other_classes(network(num_classes=2, classes=usage.get("classes")), 2, None)
