"""Pictures of words, in fonts that matplotlib ships."""

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
MARGIN = 4 / 96  # of the side, left and right of a word


def write_word(word: str, font: str, size: int) -> Image.Image:
    """
    A word in black in the middle of white, as large as fits.

    Args:
        word (`str`): What to write.
        font (`str`): A file among those that matplotlib ships, such as those of `FONTS`.
        size (`int`): Side of the picture in pixels.

    Raises:
        ImportError: without matplotlib.
    """
    points = next(points for points in range(size, 0, -1) if _fits(word, font, points, size))
    picture = Image.new("RGB", (size, size), "white")
    centre = (size / 2, size / 2)
    ImageDraw.Draw(picture).text(centre, word, fill="black", font=_load(font, points), anchor="mm")
    return picture


def _fits(word: str, font: str, points: int, size: int) -> bool:
    left, top, right, bottom = _load(font, points).getbbox(word)
    return right - left <= size * (1 - 2 * MARGIN) and bottom - top <= size / 2


@cache
def _load(font: str, points: int) -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("words need matplotlib's fonts; pip install 'cm3leon_hf[eval]'") from error
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font, points)


__all__ = ["FONTS", "write_word"]
