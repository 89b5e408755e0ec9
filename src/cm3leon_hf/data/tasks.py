"""The tasks of supervised fine-tuning as data: their data sets, columns and templates (Table 5)."""

import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import NamedTuple

import yaml

from ..processing_prompts import CONTROLS, EDITING, IMAGE_TO_IMAGE
from ..vocabulary import BREAK, IMAGE

PROMPTS = {"editing": EDITING} | {name: IMAGE_TO_IMAGE.replace("{control}", words) for name, words in CONTROLS.items()}
FIELD = re.compile(r"{(\w+)}")


class Template(NamedTuple):
    """
    A template's parts in the order of the document.

    Args:
        parts (`tuple[str, ...]`): Texts with fields in braces, and images, each a field by itself.
        is_image (`tuple[bool, ...]`): Which parts are images.
        answer (`int`): The part that is the output.
    """

    parts: tuple[str, ...]
    is_image: tuple[bool, ...]
    answer: int

    @property
    def output(self) -> str:
        return self.parts[self.answer]


@dataclass(frozen=True)
class Task:
    """
    A task: where its rows are and what documents are made of them.

    Args:
        name (`str`): Such as `"edit"`.
        title, licence (`str`), examples (`int`): Of its data set; the examples are the paper's.
        dataset (`dict`): Arguments of `datasets.load_dataset`.
        columns (`dict[str, str]`): The column that holds each field; `"a.b"` is the entry `b` of what is in column `a`.
        images, answer (`list[str]`): The fields that are pictures, and those that are the output.
        templates (`list[str]`): In Table 5's notation: fields in braces, ` <break> ` between modalities, `[newline]`.
        prompt (`str`, *optional*): In place of templates, `"editing"` or a control of the processor's prompts.
        joined (`list[str]`): Fields whose lists are read out whole; of other lists one entry is drawn.
        choices (`bool`): Whether `answer` is the number of one of the `choices`, listed in `choices_text`.
        boxes (`dict`, *optional*): The `fields` of each of the `objects`, and whether they are `relative`.

    Raises:
        ValueError: if the prompt is unknown, a template's fields are not those of the columns, or boxes in pixels
            come without the columns `width` and `height`.
    """

    name: str
    columns: dict[str, str]
    images: list[str]
    answer: list[str]
    title: str = ""
    licence: str = "unknown"
    examples: int = 0
    dataset: dict = field(default_factory=dict)
    templates: list[str] = field(default_factory=list)
    prompt: str | None = None
    joined: list[str] = field(default_factory=list)
    choices: bool = False
    boxes: dict | None = None

    def __post_init__(self):
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise ValueError(f"expected a prompt among {sorted(PROMPTS)}, got {self.prompt!r}")
        if self.boxes and not self.boxes.get("relative") and not {"width", "height"} <= {*self.columns}:
            raise ValueError(
                f"expected the columns `width` and `height` for the boxes of {self.name}, got {self.columns}; name "
                "them, or make the boxes relative"
            )
        known = {*self.columns, *(["choices_text"] if self.choices else [])}
        for wording in self.wordings:
            unknown = {*FIELD.findall(wording)} - known
            if unknown or not {*FIELD.findall(wording)} & {*self.answer}:
                raise ValueError(
                    f"expected fields among {sorted(known)} in the templates of {self.name}, one of them in "
                    f"{self.answer}, got {wording!r}; name the columns of {sorted(unknown) or 'the answer'}"
                )

    @property
    def wordings(self) -> list[str]:
        """The templates in Table 5's notation, those of prompts too."""
        if self.prompt is None:
            return self.templates
        return [PROMPTS[self.prompt].replace(IMAGE, "{input}").replace(BREAK, f" {BREAK} ") + "{image}"]

    @property
    def wanted(self) -> list[str]:
        """The columns that a data set must have."""
        return list(dict.fromkeys(path.split(".")[0] for path in self.columns.values()))

    def parsed(self) -> list[Template]:
        """The templates' parts."""
        return [parse(wording, self.images, self.answer) for wording in self.wordings]


def parse(wording: str, images: list[str], answer: list[str]) -> Template:
    """
    Takes a template apart.

    The answer is a part of its own, from the first of its fields to the last. A space in front of it is its own, as
    byte-level BPE has it; a line break is not.

    Args:
        wording (`str`): In Table 5's notation.
        images, answer (`list[str]`): The fields that are pictures, and those that are the output.
    """
    parts, is_image, place = [], [], None
    fields = "|".join(answer)
    output = re.compile(rf"( ?{{(?:{fields})}}(?:.*{{(?:{fields})}})?)", re.DOTALL)
    for segment in re.sub(r" ?\[newline\] ?", "\n", wording).split(BREAK):
        segment = segment.strip(" ")
        shown = segment[1:-1] in images
        pieces = [segment] if shown else [piece for piece in output.split(segment) if piece]
        for piece in pieces:
            if output.fullmatch(piece):
                place = len(parts)
            parts.append(piece)
            is_image.append(shown)
    return Template(tuple(parts), tuple(is_image), place)


def load_tasks() -> dict[str, Task]:
    """Table 5's tasks by name."""
    rows = yaml.safe_load(files(__package__).joinpath("tasks.yaml").read_text(encoding="utf-8"))
    return {name: Task(name=name, **fields) for name, fields in rows.items()}
