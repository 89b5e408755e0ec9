"""Fréchet distance of two sets of pictures under a feature network: FID with pytorch-fid's Inception (Table 1)."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .files import atomic
from .intervals import Measured, bootstrap

CHUNK = 4096  # features in float64 at a time


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """
    Count, mean and scatter of features, in float64.

    Args:
        count (`int`): Pictures.
        mean (`np.ndarray` of shape `(dimension,)`): Mean feature.
        scatter (`np.ndarray` of shape `(dimension, dimension)`): Sum of the outer products of what is left of the
            features without their mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance `(dimension, dimension)`, as `np.cov` gives it."""
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """A matrix `(dimension, rank)` whose product with its transpose is the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    def merged(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together (Chan et al. 1983)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta * (self.count * other.count / count))
        return FeatureStatistics(count, self.mean + delta * (other.count / count), scatter)

    def save(self, path: str | PathLike) -> None:
        """Writes the statistics as safetensors; the file appears whole."""
        with atomic(Path(path)) as part:
            save_file({"count": np.array([self.count]), "mean": self.mean, "scatter": self.scatter}, part)

    @classmethod
    def load(cls, path: str | PathLike) -> "FeatureStatistics":
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: if the file is missing, damaged or holds something else.
        """
        try:
            tensors = load_file(path)
            return cls(int(tensors["count"][0]), tensors["mean"], tensors["scatter"])
        except Exception as error:  # safetensors has an error of its own for damaged files
            raise ValueError(f"expected statistics in {path}, could not read them: {error}; remove the file") from error


def feature_statistics(batches: Iterable[np.ndarray], weights: np.ndarray | None = None) -> FeatureStatistics:
    """
    Statistics of features that pass by; no more than one batch is in memory.

    Args:
        batches (`Iterable[np.ndarray]`): Features `(pictures, dimension)`.
        weights (`np.ndarray` of shape `(pictures,)`, *optional*): How often each picture counts, through all batches.

    Raises:
        ValueError: for features that are not finite, or fewer than two pictures.
    """
    total, start = None, 0
    for batch in batches:
        batch = np.asarray(batch, np.float64)
        counts = np.ones(len(batch)) if weights is None else weights[start : start + len(batch)]
        start += len(batch)
        if not np.isfinite(batch).all():
            raise ValueError("expected finite features, got NaN or infinity; check the pictures and the network")
        if counts.any():
            one = _statistics_of_batch(batch, counts)
            total = one if total is None else total.merged(one)
    if total is None or total.count < 2:
        raise ValueError(f"expected at least two pictures, got {total.count if total else 0}; draw more")
    return total


def _statistics_of_batch(batch: np.ndarray, counts: np.ndarray) -> FeatureStatistics:
    mean = counts @ batch / counts.sum()
    centred = batch - mean
    return FeatureStatistics(int(counts.sum()), mean, (centred * counts[:, None]).T @ centred)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """
    `|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½)`, as pytorch-fid computes it.

    The trace of the root is the sum of the singular values of `R₁ᵀ R₂`, where `Rᵢ Rᵢᵀ = Cᵢ`: the same number, and exact
    where covariances are singular. It warns where there are fewer pictures than dimensions, for then the distance
    depends on the number of pictures more than on what they show.

    Raises:
        ValueError: for features of different dimensions.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"expected features of one network, got dimensions {len(one.mean)} and {len(other.mean)}; use the same"
        )
    fewest = min(one.count, other.count)
    if fewest <= len(one.mean):
        warnings.warn(
            f"{fewest} pictures for features of dimension {len(one.mean)}: their covariance is singular and the "
            "distance unreliable; compare it only with distances of as many pictures",
            stacklevel=2,
        )
    shift = one.mean - other.mean
    overlap = np.linalg.svd(one.root.T @ other.root, compute_uv=False).sum()
    return float(shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * overlap)


def measure_frechet(
    features: np.ndarray, reference: FeatureStatistics, resamples: int = 200, seed: int = 0
) -> Measured:
    """
    The distance of drawn pictures to a reference, with bootstrap replicates over the drawn ones.

    Ours: the replicates are centred at the value. A distance grows when pictures are drawn twice, so that plain
    quantiles would lie beside it.

    Args:
        features (`np.ndarray` of shape `(pictures, dimension)`): Of the drawn pictures.
        reference ([`FeatureStatistics`]): Of the real ones.
        resamples, seed (`int`): See [`~cm3leon_hf.evaluation.intervals.bootstrap`].
    """
    chunks = range(0, len(features), CHUNK)

    def distance(weights: np.ndarray) -> float:
        batches = (features[start : start + CHUNK] for start in chunks)
        return frechet_distance(feature_statistics(batches, weights), reference)

    return bootstrap(distance, len(features), resamples, seed).centred()


__all__ = ["FeatureStatistics", "feature_statistics", "frechet_distance", "measure_frechet"]
