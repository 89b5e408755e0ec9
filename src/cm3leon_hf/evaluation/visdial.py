"""NDCG of ranked answer options, the measure of the Visual Dialog challenge."""

import numpy as np


def visdial_ndcg(scores, relevance) -> np.ndarray:
    """
    The normalised discounted cumulative gain of each question; the mean is the challenge's figure.

    Of a question's options the `k` best-scored count, where `k` is the number of relevant options. Options of equal
    score rank in their order.

    Args:
        scores (array of shape `(questions, options)`): The model's, higher for better answers.
        relevance (array of shape `(questions, options)`): The share of people who found an option right, in [0, 1].

    Returns:
        `np.ndarray` of shape `(questions,)`, in [0, 1].

    Raises:
        ValueError: for shapes that differ, scores that are NaN, or a question without a relevant option.
    """
    scores, relevance = np.asarray(scores, np.float64), np.asarray(relevance, np.float64)
    if scores.shape != relevance.shape or scores.ndim != 2:
        raise ValueError(f"expected scores and relevance (questions, options), got {scores.shape}, {relevance.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"expected scores, got NaN in question {int(np.isnan(scores).any(1).argmax())}")
    relevant = (relevance != 0).sum(axis=1)
    if not relevant.all():
        raise ValueError(f"expected a relevant option in each question, got none in {int(relevant.argmin())}")
    places = np.arange(scores.shape[1])
    discounts = np.where(places < relevant[:, None], 1 / np.log2(places + 2), 0)
    ranked = np.take_along_axis(relevance, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    best = -np.sort(-relevance, axis=1)
    return (ranked * discounts).sum(axis=1) / (best * discounts).sum(axis=1)


__all__ = ["visdial_ndcg"]
