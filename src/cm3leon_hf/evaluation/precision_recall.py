"""Precision and recall of drawn pictures (Kynkäänniemi et al. 2019): fidelity and variety apart."""

from typing import NamedTuple

import numpy as np
import torch

CHUNK = 1024  # pictures whose distances to all others are in memory at a time


class PrecisionRecall(NamedTuple):
    """1 for each drawn picture within the real ones' manifold, for each real one within the drawn ones', else 0."""

    precision: np.ndarray
    recall: np.ndarray


def precision_and_recall(drawn: np.ndarray, real: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """
    Precision is the share of drawn pictures that lie within the real ones' manifold, recall the reverse: the means.

    A set's manifold is the union of balls around its features, each as wide as the distance to the `neighbours`-th
    nearest other feature of the set.

    Args:
        drawn, real (`np.ndarray` of shape `(pictures, dimension)`): Features of one network.
        neighbours (`int`): 3 in the paper.

    Raises:
        ValueError: for features of different dimensions, or sets that are not larger than `neighbours`.
    """
    if drawn.shape[1] != real.shape[1]:
        raise ValueError(f"expected features of one network, got dimensions {drawn.shape[1]} and {real.shape[1]}")
    if min(len(drawn), len(real)) <= neighbours:
        raise ValueError(f"expected more than {neighbours} pictures a set, got {len(drawn)} and {len(real)}; add some")
    drawn, real = (torch.from_numpy(np.asarray(features, np.float64)) for features in (drawn, real))
    return PrecisionRecall(_covered(drawn, real, neighbours), _covered(real, drawn, neighbours))


def _covered(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> np.ndarray:
    """Whether each point is in a ball around any of the centres."""
    radii = torch.cat([_distances(chunk, centres).kthvalue(neighbours + 1).values for chunk in centres.split(CHUNK)])
    inside = [(_distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(CHUNK)]
    return torch.cat(inside).double().numpy()


def _distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """`(points, centres)`; exactly zero from a point to itself, unlike by matrix products."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


__all__ = ["PrecisionRecall", "precision_and_recall"]
