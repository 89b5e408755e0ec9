"""Rows of public data sets to rows of tasks: the texts, images and answer of an instruction document (Table 5)."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from ..images import read_image
from ..vocabulary import Vocabulary
from .boxes import objects_at
from .tasks import FIELD, Task, Template

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "task": Value("string"),
        "texts": List(Value("string")),
        "codes": List(List(Value("int32"))),
        "answer": Value("int32"),
    }
)


class UnusableRow(ValueError):
    """A row that a task leaves out; the message is what it is counted under."""


@dataclass(eq=False)
class InstructionBuilder:
    """
    Makes a task's rows, for `datasets.map(batched=True, with_indices=True)`, or by [`~InstructionBuilder.build`].

    Which template and which of several wordings or answers a row gets depends on the seed and the row's number alone.

    Args:
        task ([`Task`]): What the rows are made of; `dataclasses.replace(task, columns=…)` fits another data set.
        vocabulary ([`Vocabulary`]): Layout of the ids.
        max_length (`int`): Longest document; a row whose images alone are longer is left out.
        encode (`Callable`, *optional*): Pictures to codes `(images, image_length)`, as a processor's `encode_images`;
            not needed where the columns hold codes.
        seed (`int`): Fixes all draws.

    Attributes:
        skipped (`Counter`): How many rows were left out, by reason.
    """

    task: Task
    vocabulary: Vocabulary
    max_length: int = 4096
    encode: Callable[[list], torch.LongTensor] | None = None
    seed: int = 0
    skipped: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.templates: list[Template] = self.task.parsed()
        fields = dict.fromkeys(name for wording in self.task.wordings for name in FIELD.findall(wording))
        self.fields = [name for name in fields if name not in self.task.images]

    def build(self, rows: Dataset | IterableDataset, batch_size: int = 64) -> Dataset | IterableDataset:
        """
        The rows of the task, with the columns `task`, `texts`, `codes` and `answer`; those that cannot be used are left
        out and counted. A stream is read as it is used, and each of its readers numbers the rows that it reads.

        Raises:
            ValueError: if there are no rows, no usable ones, or a column is missing.
        """
        rows = undecoded(rows)
        first = next(iter(rows), None)
        if first is None:
            raise ValueError(f"expected rows for the task {self.task.name}, got none; check the data set and its split")
        missing = [name for name in self.task.wanted if name not in first]
        if missing:
            raise ValueError(
                f"expected the columns {self.task.wanted} for the task {self.task.name}, got {sorted(first)}, without "
                f"{missing}; name them in the task's `columns`"
            )
        wanted = rows.select_columns(self.task.wanted)
        arguments = {"batch_size": batch_size, "remove_columns": self.task.wanted, "features": FEATURES}
        built = wanted.map(self, batched=True, with_indices=True, **arguments)
        if isinstance(built, Dataset):
            self._report(len(rows), len(built))
        return built

    def _report(self, count: int, kept: int) -> None:
        if not kept:
            raise ValueError(
                f"expected usable rows for the task {self.task.name}, got none of {count}: {dict(self.skipped)}"
            )
        if kept < count:
            logger.warning("%s: left out %d of %d rows: %s", self.task.name, count - kept, count, dict(self.skipped))

    def __call__(self, rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
        """A batch of rows, and their numbers in the data set, to the task's rows."""
        made = []
        for index, number in enumerate(numbers):
            try:
                made.append(self.row({name: values[index] for name, values in rows.items()}, number))
            except UnusableRow as reason:
                self.skipped[str(reason)] += 1
        self._encode([row["codes"] for row in made])
        return {name: [row[name] for row in made] for name in FEATURES}

    def row(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """
        One row of the task, in which pictures still stand in place of their codes.

        Raises:
            UnusableRow: if the answer or a text is empty, a picture missing or broken, a box outside of its picture, or
                if there are more images than fit.
        """
        rng = np.random.default_rng((self.seed, number))
        values = {name: entry(row, path) for name, path in self.task.columns.items()}
        images = {name: self._images(values.pop(name)) for name in self.task.images}
        if self.task.choices:
            values |= chosen(values.pop("choices"), values["answer"])
        if self.task.boxes:
            values["objects"] = self._objects(values)
        words = {name: said(values[name], rng, name in self.task.joined) for name in self.fields}
        template = self._template(words, rng)
        parts = [
            (place, one, is_image)
            for place, (part, is_image) in enumerate(zip(template.parts, template.is_image))
            for one in (images[part[1:-1]] if is_image else [FIELD.sub(lambda match: words[match[1]], part)])
        ]
        if not all(is_image or one.strip() for _, one, is_image in parts):
            raise UnusableRow("empty text")
        if sum(self.vocabulary.image_length + 1 for *_, is_image in parts if is_image) + 2 > self.max_length:
            raise UnusableRow("more images than fit")
        return {
            "task": self.task.name,
            "texts": [None if is_image else one for _, one, is_image in parts],
            "codes": [one if is_image else None for _, one, is_image in parts],
            "answer": max(index for index, (place, *_) in enumerate(parts) if place == template.answer),
        }

    def _template(self, words: dict[str, str], rng: np.random.Generator) -> Template:
        """One of the templates whose answer is not empty."""
        filled = [one for one in self.templates if all(words.get(name, " ") for name in FIELD.findall(one.output))]
        if not filled:
            raise UnusableRow("empty answer")
        return filled[rng.integers(len(filled))]

    def _objects(self, values: dict[str, Any]) -> str:
        try:
            found = objects_at(values, self.task.boxes, self.vocabulary)
        except ValueError as error:
            logger.info("%s", error)
            raise UnusableRow("box outside of its picture") from error
        if not found:
            raise UnusableRow("no object in the picture")
        return found

    def _images(self, value) -> list:
        """The pictures, or codes, of a cell that holds one or a list of them."""
        several = isinstance(value, list) and value and not isinstance(value[0], int)
        return [self._image(one) for one in (value if several else [value])]

    def _image(self, value):
        if value is None:
            raise UnusableRow("no picture")
        if isinstance(value, list):
            if len(value) != self.vocabulary.image_length:
                raise UnusableRow("codes of another grid")
            return value
        if self.encode is None:
            raise ValueError(
                f"expected codes for the task {self.task.name}, got pictures; pass encode=processor.encode_images"
            )
        try:
            return read_image((value["bytes"] or value["path"]) if isinstance(value, dict) else value)
        except ValueError as error:
            logger.info("%s", error)
            raise UnusableRow("broken picture") from error

    def _encode(self, rows: list[list]) -> None:
        """Puts codes in the place of the pictures, all encoded at once."""
        places = [
            (row, index)
            for row in rows
            for index, one in enumerate(row)
            if one is not None and not isinstance(one, list)
        ]
        if places:
            codes = self.encode([row[index] for row, index in places]).tolist()
            for (row, index), encoded in zip(places, codes):
                row[index] = encoded


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The rows with pictures as they are stored, so that a broken one does not end the run."""
    for name, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def entry(row: dict[str, Any], path: str) -> Any:
    """
    What stands at `"column"`, or in the entry `"column.name"` of it or of all that it lists.

    Raises:
        ValueError: if there is no such entry.
    """
    column, *names = path.split(".")
    value = row[column]
    for name in names:
        held = value if isinstance(value, list) else [value]
        wrong = [one for one in held if one is not None and name not in one]
        if wrong:
            raise ValueError(f"expected the entry {name!r} in the column {column!r}, got {wrong[0]}; correct {path!r}")
        found = [None if one is None else one[name] for one in held]
        value = found if isinstance(value, list) else found[0]
    return value


def said(value, rng: np.random.Generator, joined: bool) -> str:
    """A field's text: of a list all of it, or a drawn entry that is not empty."""
    if isinstance(value, list):
        several = [str(one).strip() for one in value if one is not None and str(one).strip()]
        if joined or not several:
            return " ".join(several)
        value = several[rng.integers(len(several))]
    return "" if value is None else str(value).strip()


def chosen(choices: list[str], right: int | None) -> dict[str, str]:
    """The choices as one text, "(A) … (B) …", and the right one's letter and text."""
    listed = [f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices)]
    if right is None or not 0 <= right < len(listed):
        raise UnusableRow("answer outside of the choices")
    return {"choices_text": " ".join(listed), "answer": listed[right]}
