"""The metrics of the emoji tasks: for each task, from its rows and what was answered to values for each row."""

import re
from dataclasses import dataclass

import numpy as np
from emoji_judge import CONCEPT, EmojiJudge, decoded
from PIL import Image

from cm3leon_hf.data.controls import Canny, Foreground, Scribble
from cm3leon_hf.evaluation.agreement import edge_f1, mask_iou
from cm3leon_hf.evaluation.boxes import drawn_box_iou
from cm3leon_hf.evaluation.captions import caption_scores
from cm3leon_hf.evaluation.image_to_text import short
from cm3leon_hf.evaluation.words import nearest_words

CAPTION = re.compile(r"(?P<subject>.*), (?P<style>.*) style")
SKIN_TONE = re.compile(r" with (?!.* with )[a-z -]+ skin tones?$")
CONTROLS = {"canny": Canny(), "scribble": Scribble(edges=Canny()), "segmentation": Foreground()}

Metrics = dict[str, list[float]]


@dataclass(frozen=True)
class Means:
    """
    What answers are measured with.

    Args:
        judge ([`EmojiJudge`]): Says what pictures show.
        processor ([`CM3LeonProcessor`]): Decodes codes.
        real (`dict[str, PIL.Image.Image]`): The corpus' pictures by source, of which control pictures were made.
        words (`list[str]`): All that the tasks write.
    """

    judge: EmojiJudge
    processor: object
    real: dict[str, Image.Image]
    words: list[str]

    def decode(self, answers: list) -> list[Image.Image]:
        return decoded(answers, self.processor)


def measure(task: str, rows: list[dict], answers: list, means: Means) -> Metrics:
    """
    A task's metrics, each with a value for every row that has it.

    Args:
        task (`str`): Its name.
        rows (`list[dict]`): Of the task.
        answers (`list`): Codes or texts, one for each row.
        means ([`Means`]): What to measure with.
    """
    return MEASURES[task](rows, answers, means)


def edits(rows: list[dict], answers: list, means: Means) -> Metrics:
    """Whether the judge sees the attribute that was asked for, and still the concept."""
    pictures, right = means.decode(answers), means.judge.right
    found = {}
    for kind in sorted({row["kind"] for row in rows}):
        shown = [index for index, row in enumerate(rows) if row["kind"] == kind]
        found[f"edit_{kind}"] = right(kind, [rows[index] for index in shown], [pictures[index] for index in shown])
    overall = {"edit_attribute": sum(found.values(), []), "edit_concept": right(CONCEPT, rows, pictures)}
    return {name: values for name, values in (overall | found).items() if values}


def no_edits(rows: list[dict], answers: list, means: Means) -> Metrics:
    """Share of the codes that stay as they were."""
    kept = np.array(answers) == np.array([row["codes"][row["answer"]] for row in rows])
    return {"no_edit_codes_kept": kept.mean(axis=1).tolist()}


def grounded(rows: list[dict], answers: list, means: Means) -> Metrics:
    drawn = means.decode(answers)
    return {"box_iou": [drawn_box_iou(one, row["boxes"]).mean() for one, row in zip(drawn, rows)]}


def controlled(rows: list[dict], answers: list, means: Means) -> Metrics:
    """Agreement of the control picture made of what was drawn with the one that was made of the artist's picture."""
    task = rows[0]["task"]
    again = CONTROLS[task].draw(means.decode(answers))
    given = CONTROLS[task].draw([means.real[row["source"]] for row in rows])
    name, agreement = ("segmentation_iou", mask_iou) if task == "segmentation" else (f"{task}_edge_f1", edge_f1)
    return {name: [agreement(np.asarray(one), np.asarray(other)) for one, other in zip(again, given)]}


def written(rows: list[dict], answers: list, means: Means) -> Metrics:
    """Whether no word is nearer to what was drawn than the right one, and whether an emoji is one that has its text."""
    drawn, found = means.decode(answers), {}
    words, emoji = ([index for index, row in enumerate(rows) if row["kind"] == kind] for kind in ("word", "emoji"))
    if words:
        read = nearest_words([drawn[index] for index in words], means.words)
        found["write_word"] = [one == rows[index]["value"] for one, index in zip(read, words)]
    right = means.judge.right(CONCEPT, [rows[index] for index in emoji], [drawn[index] for index in emoji])
    return found | ({"write_emoji": right} if right else {})


def captioned(rows: list[dict], answers: list, means: Means) -> Metrics:
    said = [read_caption(text) for text in answers]
    return {
        "caption_concept": [one == row[CONCEPT] for (one, _), row in zip(said, rows)],
        "caption_style": [style == row["style"] for (_, style), row in zip(said, rows)],
    }


def described(rows: list[dict], answers: list, means: Means) -> Metrics:
    """CIDEr against the one reference, in lower-case words without punctuation."""
    references = [[row["value"]] for row in rows]
    return {"long_caption_cider": caption_scores(answers, references, ("cider",), "words")["cider"].each.tolist()}


def asked(rows: list[dict], answers: list, means: Means) -> Metrics:
    right = [short(text).casefold() == row["value"].casefold() for text, row in zip(answers, rows)]
    return {"vqa_accuracy": right} | by_kind("vqa", rows, right)


def reasoned(rows: list[dict], answers: list, means: Means) -> Metrics:
    return {"reasoning_accuracy": [short(text).endswith(row["value"]) for text, row in zip(answers, rows)]}


MEASURES = dict.fromkeys(CONTROLS, controlled) | {
    "edit": edits,
    "no_edit": no_edits,
    "grounded": grounded,
    "write": written,
    "captioning": captioned,
    "long_caption": described,
    "vqa": asked,
    "reasoning": reasoned,
}


def by_kind(name: str, rows: list[dict], values: list) -> Metrics:
    kinds = sorted({row["kind"] for row in rows})
    return {f"{name}_{kind}": [one for one, row in zip(values, rows) if row["kind"] == kind] for kind in kinds}


def read_caption(text: str) -> tuple[str, str]:
    """Concept and style of a caption; empty if it is not worded as the canonical one."""
    found = CAPTION.fullmatch(text)
    return (SKIN_TONE.sub("", found["subject"]), found["style"]) if found else ("", "")
