"""Pictures that the emoji tasks need besides the corpus' own: cut-out drawings, canvases of several."""

import numpy as np
from PIL import Image

from cm3leon_hf.data.controls import Canny, Foreground, Scribble, foreground

TRIES = 200  # random places tried before a canvas is begun anew
CANVAS = 96  # side of a canvas that these pixels are for
GAP = 3  # between two drawings
SIDES = {1: (30, 80), 2: (38, 56), 3: (32, 46)}  # the longer side of each of so many drawings
COLOURS = {
    "black": (25, 25, 25),
    "dark grey": (80, 85, 90),
    "grey": (150, 155, 160),
    "white": (245, 245, 245),
    "red": (215, 40, 50),
    "orange": (245, 140, 30),
    "yellow": (255, 205, 60),
    "green": (80, 170, 70),
    "light blue": (110, 190, 240),
    "blue": (35, 100, 200),
    "purple": (140, 80, 180),
    "pink": (245, 140, 180),
    "brown": (135, 85, 55),
    "beige": (235, 195, 150),
}

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the ends not included


CONTROLS = {control.name: control for control in (Canny(), Scribble(edges=Canny()), Foreground())}


def tight_box(mask: np.ndarray) -> Box:
    """
    The smallest box around what a mask shows.

    Raises:
        ValueError: if it shows nothing.
    """
    if not mask.any():
        raise ValueError("expected a picture that shows something, got a white one; leave it out")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def compose(pictures: list[Image.Image], size: int, rng: np.random.Generator) -> tuple[Image.Image, list[Box]]:
    """
    A white canvas with one to three pictures, cut out, scaled, in random places that do not touch.

    Returns:
        The canvas and each picture's box.
    """
    cut = [picture.crop(tight_box(foreground(picture))) for picture in pictures]
    low, high = (side * size / CANVAS for side in SIDES[len(pictures)])
    while True:
        scales = rng.uniform(low, high, len(cut)) / [max(picture.size) for picture in cut]
        sizes = [tuple(max(1, round(side * scale)) for side in one.size) for one, scale in zip(cut, scales)]
        if boxes := place(sizes, size, rng):
            break
    canvas = Image.new("RGB", (size, size), "white")
    for picture, box in zip(cut, boxes):
        canvas.paste(picture.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2])
    return canvas, boxes


def place(sizes: list[tuple[int, int]], size: int, rng: np.random.Generator) -> list[Box]:
    """Boxes of these widths and heights at random, apart from each other, or none if no places were found."""
    boxes = []
    for width, height in sizes:
        for _ in range(TRIES):
            left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
            box = (left, top, left + width, top + height)
            if all(apart(box, other, GAP * size / CANVAS) for other in boxes):
                boxes.append(box)
                break
        else:
            return []
    return boxes


def apart(one: Box, other: Box, gap: float) -> bool:
    across = one[0] >= other[2] + gap or other[0] >= one[2] + gap
    return across or one[1] >= other[3] + gap or other[1] >= one[3] + gap


def dominant_colours(picture: Image.Image, share: float, most: int) -> list[str]:
    """Names of the colours that cover at least this share of what a picture shows, the largest first."""
    palette = Image.new("P", (1, 1))
    palette.putpalette([level for colour in COLOURS.values() for level in colour])
    nearest = picture.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    shown = np.asarray(nearest)[foreground(picture)]
    counts = np.bincount(shown, minlength=len(COLOURS))
    largest = [index for index in np.argsort(-counts, kind="stable") if counts[index] >= share * len(shown)]
    return [list(COLOURS)[index] for index in largest[:most]]
