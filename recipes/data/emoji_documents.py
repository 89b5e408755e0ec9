"""Rows of the emoji tasks: documents by Table 5's templates, and what an evaluation must know of them."""

from collections.abc import Sequence
from dataclasses import replace

from datasets import Features, List, Value
from emoji_corpus import Picture

from cm3leon_hf.data.instructions import FEATURES as DOCUMENT
from cm3leon_hf.data.instructions import InstructionBuilder
from cm3leon_hf.data.tasks import Task, load_tasks
from cm3leon_hf.vocabulary import Vocabulary

SHOWN = ("concept", "style", "skin_tone", "gender", "colour", "kin", "source")
FEATURES = Features(
    DOCUMENT
    | {name: Value("string") for name in ("kind", "value", "read", *SHOWN)}
    | {"objects": List(Value("string")), "boxes": List(List(Value("float32")))}
    | {"retrieved": List({"text": Value("string"), "codes": List(Value("int32"))})}
)


def emoji_tasks() -> dict[str, Task]:
    """Table 5's tasks that emoji have, each with a column of its name for every field."""
    table = load_tasks()
    captioning = table["coco"].templates[-1:]  # the other one is that of pretraining
    long = list(dict.fromkeys(table["image_paragraph"].templates + table["localized_narratives"].templates))
    tasks = {name: table[name] for name in ("edit", "write", "grounded", "canny", "segmentation", "scribble")} | {
        "no_edit": table["edit"],
        "captioning": replace(table["coco"], templates=captioning),
        "long_caption": replace(table["image_paragraph"], templates=long),
        "vqa": table["vqa2"],
        "reasoning": table["scienceqa"],
    }
    columns = {name: {field: field for field in task.columns} for name, task in tasks.items()}
    columns["grounded"] = {field: field for field in ("caption", "objects", "names", "image")}
    tasks["grounded"] = replace(
        tasks["grounded"],
        columns=columns["grounded"],
        boxes={"fields": ["x0", "y0", "x1", "y1"], "relative": True},
    )
    return {name: replace(task, name=name, columns=columns[name]) for name, task in tasks.items()}


def builders(vocabulary: Vocabulary, seed: int) -> dict[str, InstructionBuilder]:
    """What makes each task's documents of its fields."""
    return {name: InstructionBuilder(task, vocabulary, seed=seed) for name, task in emoji_tasks().items()}


def described_row(
    document: dict,
    shown: Picture | None,
    kind: str = "",
    value: str = "",
    objects: Sequence[str] = (),
    boxes: Sequence[Sequence[float]] = (),
    read: Picture | None = None,
) -> dict:
    """
    A row of `FEATURES`.

    Args:
        document (`dict`): `task`, `texts`, `codes` and `answer`.
        shown ([`Picture`], *optional*): What the picture to be drawn or described shows.
        kind (`str`): Of the task, such as what an edit changes.
        value (`str`): What is asked for: the style that a picture is to get, or the right answer.
        objects, boxes: What stands where on the picture, `x0, y0, x1, y1` in [0, 1].
        read ([`Picture`], *optional*): What the picture shows that is read, if that is another one.

    Its column `retrieved` is empty; `emoji_retrieved` fills it.
    """
    known = {name: getattr(shown, name, "") for name in SHOWN}
    said = {"kind": kind, "value": value, "objects": list(objects), "boxes": [list(box) for box in boxes]}
    said["read"] = read.source if read else known["source"]
    return document | known | said | {"retrieved": []}
