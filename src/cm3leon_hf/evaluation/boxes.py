"""How well what stands on a drawn canvas fills the boxes that were asked for."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

DARKER = 40  # than white by so many levels is drawn
SPECK = 0.001  # parts that cover less of the canvas are left out


def drawn_boxes(picture: Image.Image, asked: Sequence[Sequence[float]]) -> np.ndarray:
    """
    The box of what is drawn for each box that was asked for: all parts of the drawing that are nearest to it.

    Args:
        picture (`PIL.Image.Image`): Objects on white.
        asked (`Sequence[Sequence[float]]`): Boxes `x0, y0, x1, y1` in [0, 1].

    Returns:
        `np.ndarray` of shape `(boxes, 4)` in [0, 1]; zeros where nothing is drawn.
    """
    from skimage.measure import label, regionprops

    dark = 255 - np.asarray(picture.convert("RGB")).min(axis=2) > DARKER
    parts = [part for part in regionprops(label(dark)) if part.area >= SPECK * dark.size]
    found = np.zeros((len(asked), 4))
    if parts:
        pixels = np.concatenate([part.coords for part in parts])[:, ::-1]
        size = np.array(picture.size)
        nearest = distances((pixels + 0.5) / size, np.asarray(asked, np.float64)).argmin(axis=1)
        for index in set(nearest.tolist()):
            own = pixels[nearest == index]
            found[index] = np.concatenate([own.min(axis=0) / size, (own.max(axis=0) + 1) / size])
    return found


def distances(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of points `(points, 2)` to boxes `(boxes, 4)`: `(points, boxes)`, 0 inside."""
    outside = np.maximum(boxes[:, :2] - points[:, None], points[:, None] - boxes[:, 2:]).clip(min=0)
    return np.hypot(*np.moveaxis(outside, -1, 0))


def drawn_box_iou(picture: Image.Image, asked: Sequence[Sequence[float]]) -> np.ndarray:
    """
    Intersection over union of each box that was asked for with what is drawn for it, `(boxes,)` in [0, 1].

    Args:
        picture, asked: See [`drawn_boxes`].

    Raises:
        ValueError: without boxes.
    """
    if len(asked) == 0:
        raise ValueError("expected boxes that were asked for, got none")
    drawn = torch.from_numpy(drawn_boxes(picture, asked))
    return box_iou(torch.as_tensor(asked, dtype=drawn.dtype), drawn).diagonal().numpy()


__all__ = ["drawn_box_iou", "drawn_boxes"]
