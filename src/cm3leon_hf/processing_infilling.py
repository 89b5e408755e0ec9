"""Holes in pictures and captions: which tokens are removed, and the prompts that ask for them (section 2.2)."""

import itertools
import re

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import PILImageResampling

from .images import read_image
from .vocabulary import MASK, Vocabulary


def masked_tokens(mask, picture: Image.Image, image_processor, grid_size: int) -> torch.BoolTensor:
    """
    Which image tokens a mask picture covers.

    Args:
        mask (picture or array of shape `(height, width)`): White, or anything above half grey, where the picture is to
            be filled; an array, not zero there. As large as the picture.
        picture (`PIL.Image.Image`): What it lies over.
        image_processor (`BaseImageProcessor`): Scales and crops both alike.
        grid_size (`int`): Tokens along one side.

    Returns:
        `torch.BoolTensor` of shape `(image_length,)`; a token counts as covered if any of its pixels is.

    Raises:
        ValueError: if the mask has another size, or covers nothing that the model sees.
    """
    if isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 2:
        mask = Image.fromarray(np.asarray(mask).astype(bool))
    mask = read_image(mask).convert("L")
    if mask.size != picture.size:
        raise ValueError(f"expected a mask of the picture's size {picture.size}, got {mask.size}; resize one of them")
    white = mask.point(lambda level: 255 * (level > 127)).convert("RGB")
    plain = {"do_normalize": False, "resample": PILImageResampling.NEAREST, "return_tensors": "pt"}
    pixels = image_processor(white, **plain)["pixel_values"]
    covered = torch.nn.functional.adaptive_max_pool2d(pixels[:, :1], grid_size).flatten() > 0.5
    if not covered.any():
        raise ValueError("expected a mask that is white where to fill, got nothing white in the part that is seen")
    return covered


def image_holes(codes: torch.LongTensor, masked: torch.BoolTensor, vocabulary: Vocabulary) -> tuple[list, torch.Tensor]:
    """
    Cuts the span from the first to the last masked token out of images.

    Args:
        codes (`torch.LongTensor` of shape `(images, image_length)`): The pictures.
        masked (`torch.BoolTensor` of the same shape): Which tokens are to be filled.
        vocabulary ([`Vocabulary`]): Layout of the ids.

    Returns:
        The ids in place of each image, which end with `<infill>`, and the span's ids `(images, span_length)`, -1 where
        they are to be filled. All images lose the same span, the smallest that holds every mask.
    """
    places = masked.any(0).nonzero().flatten()
    start, stop = int(places[0]), int(places[-1]) + 1
    ids = vocabulary.codes_to_ids(codes)
    known = torch.where(masked, -1, ids)[:, start:stop]
    left = [[*row[:start], vocabulary.mask_id, *row[stop:], vocabulary.infill_id] for row in ids.tolist()]
    return left, known


def fill_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """The last image of a row `(length,)` as `(image_length,)` ids, a moved span put back in place of its `<mask>`."""
    infills = (ids == vocabulary.infill_id).nonzero().flatten()
    breaks = (ids == vocabulary.break_id).nonzero().flatten()
    if not len(infills) or not len(breaks) or infills[-1] < breaks[-1]:
        return ids[-vocabulary.image_length :]
    image, span = ids[breaks[-1] + 1 : infills[-1]], ids[infills[-1] + 1 :]
    places = (image == vocabulary.mask_id).nonzero().flatten()
    if not len(places):
        return ids[-vocabulary.image_length :]
    return torch.cat([image[: places[0]], span, image[places[0] + 1 :]])


def text_holes(text: str, tokenizer) -> tuple[str, list[list[int]]]:
    """
    Splits a text with holes.

    A hole takes the space in front of it, as a word's first token does.

    Args:
        text (`str`): Holds one or more `<mask>`.
        tokenizer (`PreTrainedTokenizerBase`): The text tokenizer.

    Returns:
        The text with one `<mask>` from the first hole to the last, and the ids of the pieces between the holes.

    Raises:
        ValueError: if there is no hole, or nothing between two of them.
    """
    first, *pieces, last = re.split(rf"\s*{re.escape(MASK)}", text) if MASK in text else [text, None]
    if last is None or not all(piece.strip() for piece in pieces):
        raise ValueError(f"expected a text with {MASK} for each hole and words between two holes, got {text!r}")
    return f"{first}{MASK}{last}", [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]


def fill_text(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """A row whose text span stands behind `<infill>`: the ids with the span back in place of `<mask>`."""
    if vocabulary.infill_id not in ids:
        return ids
    infill = len(ids) - 1 - ids[::-1].index(vocabulary.infill_id)
    before, span = ids[:infill], [token for token in ids[infill + 1 :] if token != vocabulary.eos_id]
    if vocabulary.mask_id not in before:
        return ids
    mask = len(before) - 1 - before[::-1].index(vocabulary.mask_id)
    return [*before[:mask], *span, *before[mask + 1 :]]


def split_images(ids: list[int], vocabulary: Vocabulary) -> list[tuple[bool, list[int]]]:
    """A row's parts in order, whether it is text and its ids; image tokens that make no whole image are left out."""
    parts, length = [], vocabulary.image_length
    for is_text, run in itertools.groupby(ids, lambda token: token < vocabulary.text_size):
        run = list(run)
        parts += [(True, run)] if is_text else [(False, run[i : i + length]) for i in range(0, len(run), length)]
    return [(is_text, part) for is_text, part in parts if is_text or len(part) == length]
