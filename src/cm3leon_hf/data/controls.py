"""
Control signals of pictures, as instruction tuning wants them (paper, Table 5): each a transform for `datasets.map`.

    rows.map(Canny(), batched=True)                         # adds the column "canny"
    annotated(rows, [Canny(), Depth(size=256)], batch_size=32)  # several, of pictures that may be broken
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from . import controls_extra as extra
from .controls_models import HED, Depth, Normal, Pose, Segmentation
from .controls_rows import Annotator, Control, annotated

NEAR_WHITE = 245  # darkest channel of a pixel that may be background


@dataclass(eq=False)
class Canny(Control):
    """
    Canny edges (OpenCV), white on black.

    Args:
        low (`int`): Gradients above it continue an edge.
        high (`int`): Gradients above it begin an edge.
    """

    name: ClassVar[str] = "canny"
    low: int = 100
    high: int = 200

    def __post_init__(self):
        if not 0 <= self.low <= self.high:
            raise ValueError(f"expected 0 ≤ low ≤ high, got low={self.low} and high={self.high}; swap them")

    def draw(self, pictures: list[Image.Image]) -> list[Image.Image]:
        edges = [extra.cv2.Canny(np.asarray(picture), self.low, self.high) for picture in pictures]
        return [Image.fromarray(edge) for edge in edges]


@dataclass(eq=False)
class Scribble(Control):
    """
    Lines as a child would draw them, one pixel wide, white on black: edges, thickened so that close ones become one
    line, then thinned to its middle. Ours: the paper does not say how it made its scribbles.

    Args:
        edges ([`Control`]): What finds the edges: [`HED`], or [`Canny`], which needs no checkpoint.
        threshold (`int`): Edges brighter than this of 255 count.
        thickness (`float`): Width that edges are thickened to, as a part of the picture's shorter side; lines closer
            than that become one.
    """

    name: ClassVar[str] = "scribble"
    edges: Control = field(default_factory=HED)
    threshold: int = 127
    thickness: float = 0.02

    def draw(self, pictures: list[Image.Image]) -> list[Image.Image]:
        return [Image.fromarray(self._thinned(np.asarray(edge))) for edge in self.edges.draw(pictures)]

    def _thinned(self, edge: np.ndarray) -> np.ndarray:
        width = 2 * round(self.thickness * min(edge.shape) / 2) + 1  # odd, so that the middle stays where it is
        disc = extra.cv2.getStructuringElement(extra.cv2.MORPH_ELLIPSE, (width, width))
        thick = extra.cv2.dilate((edge > self.threshold).astype(np.uint8), disc)
        return extra.skeletonize(thick > 0).astype(np.uint8) * 255


@dataclass(eq=False)
class Foreground(Control):
    """A segmentation map of two classes, for pictures on white: what they show, white on black."""

    name: ClassVar[str] = "segmentation"

    def draw(self, pictures: list[Image.Image]) -> list[Image.Image]:
        return [Image.fromarray(foreground(picture)).convert("L") for picture in pictures]


def foreground(picture: Image.Image) -> np.ndarray:
    """Where a picture on white shows something, `(height, width)`: all but the white that reaches the border."""
    white = (np.asarray(picture.convert("RGB")).min(axis=2) >= NEAR_WHITE).astype(np.uint8)
    around = np.pad(white, 1, constant_values=1)
    extra.cv2.floodFill(around, None, (0, 0), 2)
    return around[1:-1, 1:-1] != 2


@dataclass(eq=False)
class OCR(Annotator):
    """
    Texts in pictures and where they stand, for the how-to-write task: the columns `ocr_texts`, and `ocr_boxes` with x0,
    y0, x1, y1 of each text in [0, 1], from the picture's left upper corner. The models (PP-OCRv6) come with `rapidocr`.

    Args:
        min_score (`float`): Texts that the model is less sure of are left out. Symbols are read as letters with scores
            of up to 0.9, and a wrong text teaches wrong letters.
        device (`str`, *optional*): `"cuda"` or `"cpu"`; by default CUDA if the installed onnxruntime has it.

    Raises:
        ValueError: if CUDA is asked for and the installed onnxruntime lacks it.
    """

    min_score: float = 0.9
    device: str | None = None

    @property
    def features(self) -> dict:
        return {
            "ocr_texts": extra.List(extra.Value("string")),
            "ocr_boxes": extra.List(extra.List(extra.Value("float32"))),
        }

    @cached_property
    def reader(self):
        has_cuda = "CUDAExecutionProvider" in extra.onnxruntime.get_available_providers()
        if self.device == "cuda" and not has_cuda:
            raise ValueError("expected an onnxruntime with CUDA, got one without; pip install onnxruntime-gpu")
        return extra.RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.text_score": self.min_score,
                "EngineConfig.onnxruntime.use_cuda": has_cuda and self.device != "cpu",
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    def annotate(self, pictures: list[Image.Image]) -> dict[str, list]:
        found = [self.reader(picture) for picture in pictures]
        return {
            "ocr_texts": [list(result.txts or ()) for result in found],
            "ocr_boxes": [_upright(result.boxes, picture) for result, picture in zip(found, pictures)],
        }


def _upright(corners: np.ndarray | None, picture: Image.Image) -> list[list[float]]:
    """The boxes around quadrangles `(texts, 4, 2)` in pixels, as parts of the picture's sides."""
    if corners is None:
        return []
    corners = (corners / picture.size).clip(0, 1)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).tolist()


CONTROLS = {control.name: control for control in (Canny, Segmentation, HED, Pose, Depth, Normal, Scribble)}

__all__ = [
    "CONTROLS",
    "HED",
    "OCR",
    "Annotator",
    "Canny",
    "Control",
    "Depth",
    "Foreground",
    "Normal",
    "Pose",
    "Scribble",
    "Segmentation",
    "annotated",
    "foreground",
]
