"""A contact sheet of the emoji tasks: what was asked, what a model made of it, and what is right."""

import textwrap

import torch
from PIL import Image

from cm3leon_hf.evaluation.instructions import is_drawn
from cm3leon_hf.grid import draw_grid

LETTERS = 110  # of a label
SHOWN = "[image]"  # in the text of a row


def draw_sheet(rows: dict[str, list[dict]], answers: dict[str, list], processor, each: int = 3) -> Image.Image:
    """
    Draws rows of each task, a line a task: the picture that was given, the model's answer, the right one.

    Args:
        rows (`dict[str, list[dict]]`): By task, with `texts`, `codes` and `answer`.
        answers (`dict[str, list]`): By task, the model's answers to these rows: codes or texts.
        processor ([`CM3LeonProcessor`]): Decodes the codes.
        each (`int`): Rows of each task, as far apart as can be, since rows of a kind stand together.
    """
    cells = []
    for task, part in rows.items():
        shown = sorted({number * len(part) // each for number in range(each)})
        line = [row_cells(task, part[index], answers[task][index], processor) for index in shown]
        line += [[(None, "")] * 3] * (each - len(line))
        cells += [cell for group in line for cell in group]
    return draw_grid(*zip(*cells), columns=3 * each)


def row_cells(task: str, row: dict, answer, processor) -> list[tuple]:
    given = [codes for place, codes in enumerate(row["codes"]) if codes is not None and place != row["answer"]]
    said = " ".join(
        SHOWN if text is None else text.strip() for place, text in enumerate(row["texts"]) if place != row["answer"]
    )
    asked = (picture(given[0], processor) if given else None, shortened(f"{task}: {said}"))
    right = row["codes"][row["answer"]] or row["texts"][row["answer"]]
    if is_drawn(row):
        return [asked, (picture(answer, processor), "the model's"), (picture(right, processor), "the corpus's")]
    return [asked, (None, shortened(f"the model: {answer}")), (None, shortened(f"right: {right.strip()}"))]


def picture(codes: list[int], processor) -> Image.Image:
    (image,) = processor.decode_images(torch.tensor([codes], device=processor.vqgan.device))
    return image


def shortened(text: str) -> str:
    return textwrap.shorten(text, LETTERS, placeholder=" …")
