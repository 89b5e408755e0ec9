"""Labelled picture grids."""

from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, FONT_SIZE = 8, 16, 13


def draw_grid(rows: list[list[Image.Image]], labels: list[str], cell: int = 192) -> Image.Image:
    """
    Draws rows of pictures over white, each row under its label.

    Args:
        rows (`list[list[Image]]`): Pictures, row by row.
        labels (`list[str]`): One label for each row.
        cell (`int`): Side of a picture's place in pixels; pictures are scaled to it.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width = MARGIN + max(len(row) for row in rows) * (cell + MARGIN)
    texts = [wrap(label, max(12, (width - 2 * MARGIN) // (FONT_SIZE // 2 + 1))) for label in labels]
    height = MARGIN + sum(len(text) * LINE + cell + 2 * MARGIN for text in texts)
    grid = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(grid), MARGIN
    for row, text in zip(rows, texts):
        draw.multiline_text((MARGIN, top), "\n".join(text), fill="black", font=font, spacing=LINE - FONT_SIZE)
        top += len(text) * LINE + MARGIN
        for column, image in enumerate(row):
            resized = image.resize((cell, cell), Image.Resampling.LANCZOS)
            grid.paste(resized, (MARGIN + column * (cell + MARGIN), top))
        top += cell + MARGIN
    return grid
