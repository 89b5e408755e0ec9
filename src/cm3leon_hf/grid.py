"""Labelled picture grids."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, FONT_SIZE = 8, 16, 13


def draw_grid(images: list[Image.Image | None], labels: list[str], columns: int, cell: int = 160) -> Image.Image:
    """
    Draws pictures over white, row by row, each under its label.

    Args:
        images (`list[Image]`): The pictures; each is scaled to its cell. `None` leaves the cell white.
        labels (`list[str]`): A label for each picture; an empty one leaves its place white.
        columns (`int`): Pictures in a row.
        cell (`int`): Side of a picture's place in pixels.
    """
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [textwrap.fill(label, cell * 2 // FONT_SIZE) for label in labels]
    lines = max(text.count("\n") + 1 for text in wrapped)
    width, height = cell + MARGIN, cell + lines * LINE + 2 * MARGIN
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, text) in enumerate(zip(images, wrapped)):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        draw.multiline_text((left, top), text, fill="black", font=font, spacing=LINE - FONT_SIZE)
        if image is not None:
            grid.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (left, top + lines * LINE))
    return grid
