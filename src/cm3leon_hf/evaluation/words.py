"""Which word a picture shows, among those that it may show: the one whose picture is most alike."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from ..data.words import FONTS, write_word

BLUR = 1 / 64  # of a side
SHIFT = 1 / 48  # of a side: a word may stand so far from where it would


def nearest_words(pictures: Sequence[Image.Image], words: Sequence[str]) -> list[str]:
    """
    The word that each picture shows: that whose picture, in one of `FONTS`, correlates most with it, wherever it stands
    up to a small shift. Unlike an OCR, this reads letters that an image tokenizer of few codes has blurred.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): Of one size, a word in the middle of each, as
            [`~cm3leon_hf.data.words.write_word`] draws it.
        words (`Sequence[str]`): What they may show.

    Raises:
        ValueError: without words.
    """
    if not words:
        raise ValueError("expected words that pictures may show, got none")
    drawn, size = _normalised(pictures), pictures[0].width
    steps = (-round(SHIFT * size), 0, round(SHIFT * size))
    moved = [np.roll(drawn, (down, right), axis=(1, 2)) for down in steps for right in steps]
    alike = np.full((len(pictures), len(words)), -1.0)
    for font in FONTS:
        known = _normalised([write_word(word, font, size) for word in words])
        for one in moved:
            alike = np.maximum(alike, np.einsum("phw,khw->pk", one, known, optimize=True))
    return [words[index] for index in alike.argmax(axis=1)]


def _normalised(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Grey levels `(pictures, height, width)`, blurred, of mean 0 and length 1."""
    blurred = [one.convert("L").filter(ImageFilter.GaussianBlur(BLUR * one.width)) for one in pictures]
    levels = np.stack([np.asarray(one, np.float32) for one in blurred])
    levels -= levels.mean(axis=(1, 2), keepdims=True)
    return levels / np.linalg.norm(levels, axis=(1, 2), keepdims=True).clip(min=1e-6)


__all__ = ["nearest_words"]
