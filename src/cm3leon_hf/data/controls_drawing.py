"""What control signals are made of besides checkpoints: the network of HED, normals, colours of classes, skeletons."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

NECK = 17  # in the middle of the shoulders, which COCO's 17 joints lack
LIMBS = (  # of COCO's joints; arms, legs and face as OpenPose joins them
    *((NECK, 6), (6, 8), (8, 10), (NECK, 5), (5, 7), (7, 9)),
    *((NECK, 12), (12, 14), (14, 16), (NECK, 11), (11, 13), (13, 15)),
    *((NECK, 0), (0, 2), (2, 4), (0, 1), (1, 3)),
)


class HEDNetwork(nn.Module):
    """
    VGG-16's convolutions, with an edge map from each of their five blocks; the result is the sigmoid of their mean.

    Its weights have the names and shapes of ControlNet's HED.
    """

    BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        channels = 3
        for number, (width, depth) in enumerate(self.BLOCKS, start=1):
            convs = [
                nn.Conv2d(channels if first else width, width, 3, padding=1) for first in [True] + [False] * (depth - 1)
            ]
            block = nn.ModuleDict({"convs": nn.ModuleList(convs), "projection": nn.Conv2d(width, 1, 1)})
            self.add_module(f"block{number}", block)
            channels = width

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Edges `(pictures, 1, height, width)` in [0, 1] of pixels `(pictures, 3, height, width)` in [0, 255]."""
        hidden, edges = pixels - self.norm, []
        for number in range(1, len(self.BLOCKS) + 1):
            block = self.get_submodule(f"block{number}")
            hidden = hidden if number == 1 else F.max_pool2d(hidden, 2)
            for conv in block["convs"]:
                hidden = conv(hidden).relu()
            edges.append(F.interpolate(block["projection"](hidden), pixels.shape[-2:], mode="bilinear"))
        return torch.stack(edges).mean(0).sigmoid()


def unit_normals(heights: torch.Tensor) -> torch.Tensor:
    """
    Normals of surfaces above the picture's plane, by central differences.

    Args:
        heights (`torch.Tensor` of shape `(pictures, height, width)`): Towards the viewer, in pixels.

    Returns:
        `torch.Tensor` of shape `(pictures, 3, height, width)`: x to the right, y upwards, z towards the viewer.
    """
    down, right = torch.gradient(heights, dim=(1, 2))
    return F.normalize(torch.stack([-right, down, torch.ones_like(heights)], dim=1), dim=1)


def class_colours(count: int) -> np.ndarray:
    """PASCAL VOC's palette `(count, 3)`: a class's bits go to red, green and blue in turn, as their highest bits."""
    bits = np.arange(count)[:, None] >> np.arange(24) & 1
    weights = 128 >> np.arange(8)
    return (bits.reshape(count, 8, 3) * weights[:, None]).sum(1).astype(np.uint8)


def draw_skeletons(joints: np.ndarray, size: tuple[int, int], min_score: float) -> Image.Image:
    """
    Draws persons as OpenPose does: each limb and joint in its own colour, on black.

    Args:
        joints (`np.ndarray` of shape `(persons, 17, 3)`): COCO's joints: x and y in pixels, and a score.
        size (`tuple[int, int]`): Width and height of the picture.
        min_score (`float`): Joints below it, and what hangs on them, are left out.
    """
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    width = max(1, min(size) // 64)
    for person in joints:
        shoulders = person[5:7]
        person = np.vstack([person, [*shoulders[:, :2].mean(0), shoulders[:, 2].min()]])
        there = person[:, 2] >= min_score
        for number, limb in enumerate(LIMBS):
            if there[list(limb)].all():
                draw.line([tuple(person[joint, :2]) for joint in limb], _hue(number, len(LIMBS)), width)
        for number in np.flatnonzero(there):
            draw.circle(tuple(person[number, :2]), width, _hue(number, len(person)))
    return image


def _hue(number: int, count: int) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number / count, 1, 1))
