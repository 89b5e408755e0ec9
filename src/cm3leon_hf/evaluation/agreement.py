"""How far a control picture made of what was drawn agrees with the one that was given."""

import numpy as np

TOLERANCE = 0.02  # of a picture's shorter side: so far from its place, an edge still counts
BRIGHT = 127  # levels above it are edges, or inside


def edge_f1(drawn: np.ndarray, asked: np.ndarray) -> float:
    """
    F1 of edges: the harmonic mean of the share of drawn edges that were asked for, and of asked ones that were drawn,
    both to `TOLERANCE`.

    Args:
        drawn, asked (`np.ndarray` of shape `(height, width)`): Edges, white on black, in [0, 255].

    Returns:
        In [0, 1]; 1 where there are no edges on either.

    Raises:
        ValueError: for pictures of different sizes.
    """
    from skimage.morphology import dilation, disk

    drawn, asked = _masks(drawn, asked)
    if not drawn.any() and not asked.any():
        return 1.0
    near = disk(round(TOLERANCE * min(drawn.shape)))
    precision = dilation(asked, near)[drawn].sum() / max(1, drawn.sum())
    recall = dilation(drawn, near)[asked].sum() / max(1, asked.sum())
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def mask_iou(drawn: np.ndarray, asked: np.ndarray) -> float:
    """
    Intersection over union of two masks.

    Args:
        drawn, asked (`np.ndarray` of shape `(height, width)`): White on black, in [0, 255].

    Returns:
        In [0, 1]; 1 where both are black.

    Raises:
        ValueError: for pictures of different sizes.
    """
    drawn, asked = _masks(drawn, asked)
    union = (drawn | asked).sum()
    return float((drawn & asked).sum() / union) if union else 1.0


def _masks(drawn: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if drawn.shape != asked.shape:
        raise ValueError(f"expected control pictures of one size, got {drawn.shape} and {asked.shape}; scale one")
    return drawn > BRIGHT, asked > BRIGHT


__all__ = ["edge_f1", "mask_iou"]
