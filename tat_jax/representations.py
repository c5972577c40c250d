"""How good features are, by labelled images or without any: k-NN, a linear probe, the effective rank.

Plain NumPy on the host; equal features give equal numbers, whatever they were computed on.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

K = 20
_TEMPERATURE = 0.07
_ROWS = 1024  # of queries, or of features, that are worked on at a time
_LAMBDAS = 10.0 ** np.arange(-6, 3)  # times the features' mean variance
_SHARE = 5  # of so many images one is held out, evenly spaced

Features = Float32[np.ndarray, "_ channels"]  # of images
Labels = Int[np.ndarray, "_"]


class Labelled(NamedTuple):
    """Features of images, with their labels."""

    features: Features
    labels: Labels

    def take(self, rows: np.ndarray) -> "Labelled":
        """Return some of them."""
        return Labelled(self.features[rows], self.labels[rows])


def knn_hits(train: Labelled, queries: Labelled | None, num_classes: int, *, k: int = K) -> int:
    """Return how many images their k nearest neighbours in `train` classify rightly.

    The neighbours are those of the greatest cosine s, each votes for its class with exp(s / 0.07), and of
    equal votes the lower class wins: the k-NN of Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination, Wu et al., CVPR 2018, as DINO, iBOT and DINOv2 evaluate.

    Args:
        train: the neighbours.
        queries: what is classified; None is `train` itself, each image by all others.
        num_classes: of both.
        k: neighbours.
    """
    leave_one_out = queries is None
    queries = train if queries is None else queries
    there = _normalised(train.features).T
    hits = 0
    for first in range(0, len(queries.labels), _ROWS):
        cosines = _normalised(queries.features[first : first + _ROWS]) @ there
        rows = np.arange(len(cosines))[:, None]
        if leave_one_out:
            cosines[rows[:, 0], first + rows[:, 0]] = -np.inf
        nearest = np.argpartition(cosines, -k, axis=1)[:, -k:]
        votes = np.zeros((len(cosines), num_classes))
        weights = np.exp((cosines[rows, nearest].astype(np.float64) - 1) / _TEMPERATURE)
        np.add.at(votes, (rows, train.labels[nearest]), weights)
        hits += int(np.sum(votes.argmax(1) == queries.labels[first : first + _ROWS]))
    return hits


def probe_hits(train: Labelled, queries: Labelled, num_classes: int) -> int:
    """Return how many images a linear probe on features classifies rightly.

    Ridge regression onto one-hot targets in closed form and float64, W = (XᵀX + n λ v I)⁻¹ XᵀY of n centred
    features, of mean variance v, and centred targets; the intercept is not penalised. λ, of 1e-6 to 100 in
    powers of ten, is the one by which a fit to four fifths of `train` classifies the most of the last fifth,
    every fifth image; of equal ones the greatest. The probe is then fitted to all of `train`.
    """
    rows = np.arange(len(train.labels)) % _SHARE == _SHARE - 1
    held = train.take(rows)
    chosen = max(
        (_hits(fit, held), scale) for scale, fit in _ridges(train.take(~rows), num_classes, _LAMBDAS)
    )[1]
    ((_, fit),) = _ridges(train, num_classes, np.array([chosen]))
    return _hits(fit, queries)


def part(labelled: Labelled) -> tuple[Labelled, Labelled]:
    """Return four fifths of labelled images, and every fifth, where there is no split to count on."""
    rows = np.arange(len(labelled.labels)) % _SHARE == 0
    return labelled.take(~rows), labelled.take(rows)


def effective_rank(features: Features) -> float:
    """Return exp(−Σ p log p) of the singular values' shares p = σ / Σσ of a matrix of features.

    The effective rank: a measure of effective dimensionality, Roy & Vetterli, EUSIPCO 2007; from 1, where all
    features are one direction, to the number of channels.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


_Fit = tuple[Float[np.ndarray, "channels classes"], Float[np.ndarray, " classes"]]


def _ridges(train: Labelled, num_classes: int, scales: np.ndarray) -> list[tuple[float, _Fit]]:
    """Return the weights and the intercept of ridge regression for each scale."""
    count, channels = train.features.shape
    mean = train.features.mean(0, dtype=np.float64)
    shares = np.bincount(train.labels, minlength=num_classes) / count
    gram, moments = np.zeros((channels, channels)), np.zeros((channels, num_classes))
    for first in range(0, count, _ROWS):
        x = train.features[first : first + _ROWS] - mean
        gram += x.T @ x
        moments += x.T @ (np.eye(num_classes)[train.labels[first : first + _ROWS]] - shares)
    values, vectors = np.linalg.eigh(gram)
    turned, unit = vectors.T @ moments, max(np.trace(gram) / channels, np.finfo(float).tiny)
    fits = []
    for scale in scales.tolist():
        weights = vectors @ (turned / (np.maximum(values, 0) + scale * unit)[:, None])
        fits.append((scale, (weights, shares - mean @ weights)))
    return fits


def _hits(fit: _Fit, queries: Labelled) -> int:
    weights, intercept = fit
    hits = 0
    for first in range(0, len(queries.labels), _ROWS):
        scores = queries.features[first : first + _ROWS].astype(np.float64) @ weights + intercept
        hits += int(np.sum(scores.argmax(1) == queries.labels[first : first + _ROWS]))
    return hits


def _normalised(features: Features) -> Features:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)
