"""Objects with their boxes, in the square that the processor cuts out of a picture, as prompts write them (Table 5)."""

import numpy as np

from ..processing_prompts import object_at
from ..vocabulary import Vocabulary


def square_box(box, width: float, height: float) -> np.ndarray | None:
    """
    A box in the square that the image processor cuts out of a picture's middle.

    Args:
        box: `x0, y0, x1, y1` in pixels of the picture, from its upper left corner.
        width, height (`float`): The picture's, in the same unit.

    Returns:
        `np.ndarray` of shape `(4,)` in [0, 1], or `None` where the square shows nothing of the box.

    Raises:
        ValueError: if the box is empty, or reaches out of the picture by more than a hundredth of its side, which
            rounding does not explain.
    """
    box, size = np.asarray(box, np.float64), np.array([width, height, width, height], np.float64)
    if not (box[:2] < box[2:]).all() or (box < -0.01 * size).any() or (box > 1.01 * size).any():
        raise ValueError(
            f"expected a box x0, y0, x1, y1 in a picture of {width:g}×{height:g}, got {box.tolist()}; check its order "
            "and unit"
        )
    side = min(width, height)
    inside = ((box - (size - side) / 2) / side).clip(0, 1)
    return inside if (inside[:2] < inside[2:]).all() else None


def objects_at(values: dict, boxes: dict, vocabulary: Vocabulary) -> str:
    """
    What is where, as Table 5 writes it: `obj1 at loc1, obj2 at loc2`, without what the square does not show.

    Args:
        values (`dict`): `objects`, each a list of the values that `boxes["fields"]` names; their `names`, unless they
            are parts of the `caption`; `width` and `height` of the picture, which is a square without them.
        boxes (`dict`): The `fields`, in which `x1, y1` may be `w, h`; whether they are `relative` to the picture.
        vocabulary ([`Vocabulary`]): Layout of the ids.

    Raises:
        ValueError: as [`square_box`].
    """
    width, height = values.get("width", 1), values.get("height", 1)
    found = []
    for index, listed in enumerate(values["objects"]):
        one = dict(zip(boxes["fields"], listed))
        name = values["caption"][int(one["start"]) : int(one["end"])] if "start" in one else values["names"][index]
        corner = np.array([one["x0"], one["y0"]])
        end = np.array([one["x1"], one["y1"]]) if "x1" in one else corner + [one["w"], one["h"]]
        box = np.concatenate([corner, end]) * ([width, height] * 2 if boxes.get("relative") else 1)
        shown = square_box(box, width, height)
        if shown is not None:
            found.append(object_at(name, shown, vocabulary))
    return ", ".join(found)
