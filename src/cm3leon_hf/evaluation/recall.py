"""Whether a drawn picture finds its own prompt among all prompts: retrieval R@k under CLIP."""

import numpy as np

from .files import check_as_many

CHUNK = 1024  # pictures whose similarities to all texts are in memory at a time


def text_ranks(image_vectors: np.ndarray, text_vectors: np.ndarray, texts: list[str]) -> np.ndarray:
    """
    The rank of each picture's own text among all different texts; 1 is the best.

    Equal texts are one. A text that is exactly as similar as the picture's own comes before it, so that pictures that
    say nothing rank last.

    Args:
        image_vectors, text_vectors (`np.ndarray` of shape `(items, dimension)`): Unit vectors of each picture and of
            its text.
        texts (`list[str]`): The texts.

    Returns:
        `np.ndarray` of shape `(items,)`, from 1 to the number of different texts.

    Raises:
        ValueError: if the numbers differ.
    """
    check_as_many("pictures", image_vectors, "texts", texts)
    _, first, own = np.unique(texts, return_index=True, return_inverse=True)
    return np.concatenate(
        [
            _ranks(image_vectors[start : start + CHUNK], text_vectors[first], own[start : start + CHUNK])
            for start in range(0, len(own), CHUNK)
        ]
    )


def _ranks(pictures: np.ndarray, texts: np.ndarray, own: np.ndarray) -> np.ndarray:
    similarities = pictures @ texts.T
    mine = similarities[np.arange(len(own)), own]
    return (similarities >= mine[:, None]).sum(axis=1)


def recall_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 for each item whose rank is at most `k`, else 0; the mean is R@k."""
    return (ranks <= k).astype(np.float64)


__all__ = ["recall_at", "text_ranks"]
