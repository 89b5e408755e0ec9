"""A picture of the emoji tasks: some rows of each, decoded from their codes."""

import textwrap

import torch
from PIL import Image

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.grid import draw_grid

SHOWN = "[image]"  # in the text of a row
LETTERS = 150  # of a row's text


def draw_rows(rows: list[dict], vqgan: CM3LeonVQGAN, columns: int = 3) -> Image.Image:
    """
    Draws rows, so many side by side: the images of each behind one another, its text above the first.

    Args:
        rows (`list[dict]`): With `task`, `texts` and `codes`.
        vqgan ([`CM3LeonVQGAN`]): Decodes the codes.
        columns (`int`): Rows side by side.
    """
    places = max(sum(one is not None for one in row["codes"]) for row in rows)
    images, labels = [], []
    for row in rows:
        shown = decode([one for one in row["codes"] if one is not None], vqgan)
        said = " ".join(SHOWN if text is None else text.strip() for text in row["texts"])
        images += shown + [None] * (places - len(shown))
        labels += [textwrap.shorten(f"{row['task']}: {said}", LETTERS, placeholder=" …")] + [""] * (places - 1)
    return draw_grid(images, labels, columns * places)


@torch.no_grad()
def decode(codes: list[list[int]], vqgan: CM3LeonVQGAN) -> list[Image.Image]:
    """Pictures of codes `(images, image_length)`."""
    pixels = vqgan.decode(torch.tensor(codes, device=vqgan.device))
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]
