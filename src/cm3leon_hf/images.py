"""Reading pictures the way a person would expect: upright, over white, in RGB; and what turns them into pixels."""

import os
import warnings
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling

from .configuration_vqgan import CM3LeonVQGANConfig

MAX_PIXELS = 64_000_000  # one side of 8000 pixels; more than any camera's picture that a small grid could use
MAX_ASPECT_RATIO = 10  # a centre crop would keep less than a tenth of the picture
ADDRESSES = ("http://", "https://", "data:image/")
TIMEOUT = 30  # seconds for an answer from an address

ImageSource = "Image.Image | str | Path | bytes | np.ndarray | torch.Tensor"


def default_image_processor(config: CM3LeonVQGANConfig) -> CLIPImageProcessor:
    """Scales the shorter side to the VQGAN's resolution, crops the centre, and maps pixels to [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": config.resolution},
        crop_size={"height": config.resolution, "width": config.resolution},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_STANDARD_MEAN,
        image_std=IMAGENET_STANDARD_STD,
    )


def read_image(source) -> Image.Image:
    """
    Reads one picture as an upright RGB image, transparency over white.

    Args:
        source (`PIL.Image.Image`, `str`, `Path`, `bytes`, `np.ndarray` or `torch.Tensor`): A picture, a path, an
            address (`http:`, `https:` or `data:`), an encoded file's bytes, or an array of shape `(height, width, 3)`
            or `(3, height, width)` with uint8 values, or floats in [0, 1].

    Returns:
        `PIL.Image.Image`: mode RGB, EXIF rotation applied.

    Raises:
        ValueError: if the file is missing, is no image, is truncated or too large, if the picture is empty or its
            aspect ratio beyond 10:1, or if an array has another type, holds NaN or values outside its range.
    """
    image = _open(source)
    _check_size(image)
    return to_rgb(_load_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: 16-bit scaled to 8, palette and alpha laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open(source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, torch.Tensor):  # NumPy knows no bfloat16
        source = source.detach().cpu().float() if source.is_floating_point() else source.cpu()
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    if isinstance(source, bytes):
        return _open_file(BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, Path) or (isinstance(source, str) and os.path.isfile(source)):
        return _open_file(source, str(source))
    if isinstance(source, str) and source.startswith(ADDRESSES):
        return _open_file(BytesIO(_fetch(source)), source[:80])
    raise ValueError(
        f"expected a picture, a path or bytes, got {str(source)[:200]!r}, which is no file; check the path"
    )


def _fetch(address: str) -> bytes:
    try:
        with urlopen(address, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"expected an address of an image, could not read {address[:80]}: {error}") from error


def _open_file(file, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # the size is checked below, with our own limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels: {name}: {error}; scale the picture down") from error
    except Exception as error:  # Pillow's formats raise nearly anything for broken data
        raise ValueError(f"expected an image file, could not read {name}: {error}") from error


def _load_upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ValueError(f"expected a whole image file, got a broken or truncated one: {error}") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if not width * height:
        raise ValueError(f"expected a picture with pixels, got {width}×{height}; check the picture's source")
    if width * height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {width}×{height}; scale the picture down")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}:1, got {width}×{height}; crop the picture first"
        )


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("expected finite pixels, got NaN or infinity; check the picture's source")
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255)
    top = 65535 if is_16_bit else 255
    return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise ValueError(
            f"expected an array of shape (height, width, 3), got {array.shape}; pass one picture at a time"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise ValueError("expected float pixels in [0, 1], got NaN or values outside; scale the array first")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels, or floats in [0, 1], got {array.dtype}; convert the array first")
    return Image.fromarray(
        np.ascontiguousarray(array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array)
    )
