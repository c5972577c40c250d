"""The rivals' losses of logits and of vectors beside their formulas in PyTorch or NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tat_jax import losses
from tat_jax.batch import Batch
from tat_jax.losses.correlation_congruence import CorrelationCongruence
from tat_jax.networks.view import Outputs

LABELS = np.array([4, 0, 6, 6, 2])
OTHERS = torch.arange(7)[None] != torch.from_numpy(LABELS)[:, None]


def kd(s, t, *, temperature):
    p = torch.softmax(t / temperature, 1)
    divergence = functional.kl_div(torch.log_softmax(s / temperature, 1), p, reduction="batchmean")
    return temperature**2 * divergence


def standardized(s, t, *, temperature):
    s, t = ((x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) for x in (s, t))
    return kd(s, t, temperature=temperature)


def own_and_others(z, temperature):
    """Return the probability of the label, of all others together, and of each among the others."""
    p = torch.softmax(z / temperature, 1)
    own = p[~OTHERS]
    others = torch.stack([row[mask] for row, mask in zip(p, OTHERS, strict=True)])
    return own, 1 - own, others / others.sum(1, keepdim=True)


def dkd(s, t, *, alpha, beta, temperature):
    divergences = [
        (q * (q / p).log()).sum() / len(s)
        for p, q in zip(own_and_others(s, temperature), own_and_others(t, temperature), strict=True)
    ]
    return temperature**2 * (alpha * (divergences[0] + divergences[1]) + beta * divergences[2])


def nkd(s, t, *, gamma, temperature):
    of_label = -(own_and_others(t, 1)[0] * own_and_others(s, 1)[0].log()).mean()
    q, p = own_and_others(t, temperature)[2], own_and_others(s, temperature)[2]
    return of_label - gamma * temperature**2 * (q * p.log()).sum(1).mean()


def dist(s, t, *, beta, gamma, temperature):
    p, q = (torch.softmax(z / temperature, 1) for z in (s, t))

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a @ b) / (a.norm() * b.norm() + 1e-8)

    within = torch.stack([correlation(*rows) for rows in zip(p, q, strict=True)]).mean()
    between = torch.stack([correlation(*columns) for columns in zip(p.T, q.T, strict=True)]).mean()
    return temperature**2 * (beta * (1 - within) + gamma * (1 - between))


def rkd(s, t, *, distance, angle):
    def distances(x):
        found = torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
        return found / found[found > 0].mean()

    def cosines(x):
        directions = functional.normalize(x[None] - x[:, None], dim=2)
        return torch.stack([at_image @ at_image.T for at_image in directions])

    of_pairs = functional.smooth_l1_loss(distances(s), distances(t))
    return distance * of_pairs + angle * functional.smooth_l1_loss(cosines(s), cosines(t))


def pkt(s, t):
    def likelihoods(x):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        near = (x @ x.T + 1) / 2
        return near / near.sum(1, keepdim=True)

    p, q = likelihoods(s), likelihoods(t)
    return (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()


def of_labels(loss):
    return lambda s, t, **options: loss(s, t, LABELS, **options)


def of_standardized(s, t, **options):
    return losses.kd(losses.logit_standardization(s), losses.logit_standardization(t), **options)


CASES = [
    (losses.kd, kd, {"temperature": 4.0}),
    (losses.kd, kd, {"temperature": 0.5}),
    (of_standardized, standardized, {"temperature": 2.0}),
    (of_labels(losses.dkd), dkd, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
    (of_labels(losses.dkd), dkd, {"alpha": 0.3, "beta": 0.5, "temperature": 1.0}),
    (of_labels(losses.nkd), nkd, {"gamma": 3.5, "temperature": 3.0}),
    (of_labels(losses.nkd), nkd, {"gamma": 1.5, "temperature": 1.0}),
    (losses.dist, dist, {"beta": 1.0, "gamma": 1.0, "temperature": 4.0}),
    (losses.dist, dist, {"beta": 0.2, "gamma": 3.0, "temperature": 1.0}),
    (losses.rkd, rkd, {"distance": 25.0, "angle": 50.0}),
    (losses.rkd, rkd, {"distance": 1.0, "angle": 0.1}),
    (losses.pkt, pkt, {}),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    CASES,
    ids=["-".join([theirs.__name__, *map(str, options.values())]) for _, theirs, options in CASES],
)
def test_a_loss_and_its_gradient_are_those_of_the_formula_in_pytorch(ours, theirs, options, x64):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(5, 7)), 3 * rng.normal(size=(5, 7))
    value, gradient = jax.value_and_grad(lambda s: ours(s, jnp.asarray(teacher), **options))(
        jnp.asarray(student)
    )
    leaf = torch.tensor(student, requires_grad=True)
    expected = theirs(leaf, torch.from_numpy(teacher), **options)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    of_student = leaf.grad.numpy()
    np.testing.assert_allclose(gradient, of_student, rtol=1e-10, atol=1e-12 * np.abs(of_student).max())


@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 3, 7)], ids=["vectors", "maps"])
def test_correlation_congruence_is_its_formula_in_numpy_and_of_maps_that_of_their_means(shape, x64):
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(rng.normal(size=(*shape[:-1], channels))) for channels in (7, 4))
    loss = CorrelationCongruence(
        7, 4, student_tap="a", teacher_tap="b", features=3, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    batch = Batch(np.zeros((5, 1, 1, 3), np.uint8), None, np.ones(5, bool))
    found = loss(Outputs(None, {"a": student}), Outputs(None, {"b": teacher}), batch, train=True)

    embedded = [
        np.asarray(x).reshape(5, -1, x.shape[-1]).mean(1) @ np.asarray(layer.kernel) + np.asarray(layer.bias)
        for x, layer in ((student, loss.student), (teacher, loss.teacher))
    ]
    difference = np.abs(embedded[0] - embedded[1])
    neighbours = [difference[i] @ difference[i + 1] for i in range(4)]
    np.testing.assert_allclose(found, np.mean(neighbours), rtol=1e-12)
