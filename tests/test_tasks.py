"""Tasks: every template as Table 5 has it, rows that cannot be used, prompts that are the processor's."""

import io
import itertools
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
from conftest import REPOSITORY, TEXT_SIZE, draw
from test_instructions import CODES, made

from cm3leon_hf.data.instructions import FEATURES, InstructionBuilder
from cm3leon_hf.data.rows import usable
from cm3leon_hf.data.tasks import Task, load_tasks
from cm3leon_hf.data.transform import CM3Transform

A, B = CODES[::-1], CODES
TASKS = load_tasks()
README = (REPOSITORY / "recipes" / "sft" / "README.md").read_text(encoding="utf-8")
ROWS = {
    "edit": {"original_image": A, "edit_prompt": "make it blue", "edited_image": B},
    "write": {"ocr_texts": ["SALE", "now"], "image": B},
    "grounded": {
        "caption": "a dog by a cat",
        "noun_chunks": [[0, 5, 0, 0.5, 0.5, 1, 0.9], [9, 14, 0.25, 0, 1, 0.999, 0.8]],
        **{"width": 100, "height": 100, "url": B},
    },
    "coco": {"caption": "a house", "image": B},
    "flickr30k": {"caption": ["a house"] * 5, "image": B},
    "image_paragraph": {"paragraph": "a house", "url": B},
    "localized_narratives": {"texts": [{"user": "say it", "assistant": "a house", "source": "x"}], "images": [B]},
    "scienceqa": {
        **{"question": "what floats?", "hint": "wood is light", "choices": ["iron", "wood"], "answer": 1, "image": B},
        "solution": "wood is light.",
    },
}
ROWS |= {name: {name: A, "text": "a house", "image": B} for name in TASKS if TASKS[name].prompt == name}
ROWS |= {name: {"question": "what is it?", "answers": ["yes"] * 10, "image": B} for name in ("vqa2", "vizwiz", "okvqa")}
SIGNALS = {
    "canny": "canny edge features",
    "segmentation": "a segmentation map",
    "hed": "hed features",
    "pose": "openpose features",
    "depth": "depth features",
    "normal": "3D norm features",
    "scribble": "children’s scribbles",
}
BOXES = "a dog at <loc_0><loc_128><loc_128><loc_255>, a cat at <loc_64><loc_0><loc_255><loc_255>"
LESSON = "Question: what floats?\nContext: wood is light\nOptions: (A) iron (B) wood\nAnswer: "
TABLE = {
    "edit": {"Edit first image following the instruction<break>A<break>make it blue<break>B"},
    "write": {"draw “SALE now”<break>B"},
    "grounded": {f"Generate high quality image of a dog by a cat with segmentations {BOXES}<break>B"},
    "image_paragraph": {
        "Describe the given picture in very detail. a house<break>B",
        "Describe all the objects in the given image in very detail. a house<break>B",
        "Generate a long caption for the given image. a house<break>B",
    },
    "localized_narratives": {
        "Generate a long narration of what is happening in the given image. a house<break>B",
        "Generate a long caption for the given image. a house<break>B",
    },
    "scienceqa": {
        f"{LESSON}(B) wood.<break>B",
        f"{LESSON}Let’s think step-by-step: wood is light. So the answer is (B) wood.<break>B",
    },
}
TABLE |= {
    name: {f"Make high quality image from {signal}<break>A<break>a house<break>B"} for name, signal in SIGNALS.items()
}
TABLE |= {name: {"a house<break>B", "Describe the given picture. a house<break>B"} for name in ("coco", "flickr30k")}
TABLE |= {
    name: {
        "Question: what is it? Answer: yes.<break>B",
        "Question: what is it?\nyes<break>B",
        "Question: what is it? The answer is yes.<break>B",
    }
    for name in ("vqa2", "vizwiz", "okvqa")
}


@pytest.fixture
def transform(processor, vocabulary):
    def build(**arguments) -> CM3Transform:
        return CM3Transform(processor.tokenizer, vocabulary, **{"max_length": 96, "answer_share": 1.0} | arguments)

    return build


@pytest.fixture
def builder(vocabulary):
    def build(task: str | Task, **arguments) -> InstructionBuilder:
        task = TASKS[task] if isinstance(task, str) else task
        return InstructionBuilder(task, vocabulary, **{"max_length": 96} | arguments)

    return build


def phrasings(builder: InstructionBuilder) -> list[dict]:
    """The row of a task in each of its phrasings."""
    rows = [builder.row(ROWS[builder.task.name], number) for number in range(40)]
    return list({str(row): row for row in rows}.values())


def written(ids: list[int], tokenizer) -> str:
    """A document as text, with a letter for each image."""
    assert ids[0] == ids[-1] == 1
    letters = {tuple(TEXT_SIZE + code for code in codes): letter for codes, letter in ((A, "A"), (B, "B"))}
    runs = [(is_image, tuple(run)) for is_image, run in itertools.groupby(ids[1:-1], lambda id: id >= TEXT_SIZE)]
    return "".join(letters[run] if is_image else tokenizer.decode(run) for is_image, run in runs)


def test_every_task_of_the_table_is_there():
    assert len(TASKS) == 18 and set(TABLE) == set(TASKS) == set(ROWS)
    assert sum(task.examples for task in TASKS.values()) == 11_406_000


@pytest.mark.parametrize("name", TASKS)
def test_every_phrasing_is_that_of_the_table(name, builder, transform, processor):
    rows = phrasings(builder(name))
    plain, _ = made(transform(answer_share=0.0, span_rate=0.0, max_length=999), rows)
    assert {written(ids, processor.tokenizer) for ids in plain} == TABLE[name] and len(rows) == len(TABLE[name])


@pytest.mark.parametrize("name", TASKS)
def test_every_phrasing_begins_with_its_prompt(name, builder, transform, processor, vocabulary):
    rows = phrasings(builder(name))
    for row, ids in zip(rows, made(transform(max_length=999), rows)[0]):
        answer, shown = row["answer"], [codes for codes in row["codes"] if codes]
        if row["texts"][answer] is None:
            text = "<break>".join("<image>" if text is None else text for text in row["texts"][:-1]) + "<break>"
            assert answer == len(row["texts"]) - 1
            output = [TEXT_SIZE + code for code in shown.pop()]
        else:
            texts = ["<mask>" if place == answer else text for place, text in enumerate(row["texts"][:-1])]
            text = "".join(texts) + "<break><image><infill>"
            output = processor.tokenizer(row["texts"][answer])["input_ids"]
        prompt = processor(text=text, image_codes=shown or None)["input_ids"][0].tolist()
        assert ids == [*prompt, *output, vocabulary.eos_id]


def test_pictures_are_encoded_and_prompts_are_those_of_the_processor(builder, transform, processor):
    picture, other = draw("red", "circle"), draw("blue", "square")
    stored = io.BytesIO()
    picture.save(stored, "png")
    row = {"original_image": {"bytes": stored.getvalue(), "path": None}, "edit_prompt": "blue", "edited_image": other}
    edit = builder("edit", encode=processor.encode_images)({name: [value] for name, value in row.items()}, [0])
    ids = made(transform(), [{name: values[0] for name, values in edit.items()}])[0][0]
    prompt = processor.for_editing(picture, "blue")["input_ids"][0].tolist()
    codes = processor.encode_images(other)[0] + TEXT_SIZE
    assert ids == [*prompt, *codes.tolist(), 1]
    for name in SIGNALS:
        row = {name: [picture], "text": ["blue"], "image": [other]}
        controlled = builder(name, encode=processor.encode_images)(row, [0])
        ids = made(transform(), [{name: values[0] for name, values in controlled.items()}])[0][0]
        prompt = processor.for_image_to_image(picture, name, "blue")["input_ids"][0].tolist()
        assert ids == [*prompt, *codes.tolist(), 1]
    ids = made(transform(max_length=128), [builder("grounded").row(ROWS["grounded"], 0)])[0][0]
    boxes = [("a dog", (0, 0.5, 0.5, 1)), ("a cat", (0.25, 0, 1, 0.999))]
    prompt = processor.for_boxes("a dog by a cat", boxes)["input_ids"][0].tolist()
    assert ids == [*prompt, *(TEXT_SIZE + code for code in B), 1]
    with pytest.raises(ValueError, match="expected codes for the task edit, got pictures; pass encode=processor"):
        builder("edit").row({"original_image": picture, "edit_prompt": "blue", "edited_image": other}, 0)


def test_draws_depend_on_the_seed_and_the_number_of_the_row(builder):
    row = {"question": "what is it?", "answers": ["yes", "no", ""], "image": B}
    build = builder("vqa2")
    rows = [build.row(row, number) for number in range(60)]
    assert [build.row(row, number) for number in reversed(range(60))] == rows[::-1]
    assert [builder("vqa2", seed=1).row(row, number) for number in range(60)] != rows
    assert {each["texts"][each["answer"]] for each in rows} == {" yes", " no", "yes", "no"}


def test_a_data_set_becomes_rows_of_the_task(builder, vocabulary):
    rows = datasets.Dataset.from_list([ROWS["edit"] | {"other": index} for index in range(5)])
    built = builder("edit").build(rows, batch_size=2)
    assert built.features == FEATURES and len(built) == 5 and usable(built.data.table, vocabulary).all()
    streamed = list(builder("edit").build(rows.to_iterable_dataset(), batch_size=2))
    assert streamed == built.to_list()


def test_an_entry_that_is_not_there_is_refused(builder):
    with pytest.raises(ValueError, match="expected the entry 'assistant' in the column 'texts', got {'said': 'a'}"):
        builder("localized_narratives").row({"texts": [{"said": "a"}], "images": [B]}, 0)


def test_columns_can_have_other_names(builder):
    mine = replace(TASKS["edit"], columns={"input": "before", "text": "how", "image": "after"})
    rows = datasets.Dataset.from_list([{"before": A, "how": "blue", "after": B}])
    assert builder(mine).build(rows)[0]["texts"] == ["Edit first image following the instruction", None, "blue", None]


def picture_bytes() -> bytes:
    stored = io.BytesIO()
    draw("red", "circle").save(stored, "png")
    return stored.getvalue()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("coco", {"caption": " "}, "empty answer"),
        ("vqa2", {"answers": []}, "empty answer"),
        ("localized_narratives", {"texts": None}, "empty answer"),
        ("edit", {"edit_prompt": None}, "empty text"),
        ("edit", {"edited_image": None}, "no picture"),
        ("edit", {"edited_image": B[1:]}, "codes of another grid"),
        ("coco", {"image": {"bytes": picture_bytes()[:60], "path": None}}, "broken picture"),
        ("coco", {"image": [B] * 6}, "more images than fit"),
        ("grounded", {"noun_chunks": [[0, 5, 0, 0, 1.2, 1, 0.9]]}, "box outside of its picture"),
        ("grounded", {"noun_chunks": [[0, 5, 0.5, 0, 0.2, 1, 0.9]]}, "box outside of its picture"),
        ("grounded", {"noun_chunks": [[0, 5, 0, 0, 0.1, 1, 0.9]], "width": 300}, "no object in the picture"),
        ("scienceqa", {"answer": 2}, "answer outside of the choices"),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_and_counted(name, changes, reason, builder, processor):
    build = builder(name, encode=processor.encode_images)
    rows = [ROWS[name], ROWS[name] | changes, ROWS[name]]
    made = build({column: [row[column] for row in rows] for column in ROWS[name]}, [0, 1, 2])
    assert len(made["texts"]) == 2 and build.skipped == {reason: 1}
    if name == "coco" and "caption" in changes:
        with pytest.raises(
            ValueError, match="expected usable rows for the task coco, got none of 1: {'empty answer': 1}"
        ):
            builder(name).build(datasets.Dataset.from_list([ROWS[name] | changes]))


def test_an_empty_explanation_leaves_the_direct_phrasing(builder):
    rows = [builder("scienceqa").row(ROWS["scienceqa"] | {"solution": "", "hint": ""}, number) for number in range(20)]
    assert {row["texts"][1] for row in rows} == {" (B) wood"}
    assert {row["texts"][0] for row in rows} == {LESSON.replace("wood is light", "")[:-1]}


def test_tasks_without_rows_or_columns_are_refused(builder):
    with pytest.raises(ValueError, match="expected rows for the task coco, got none; check the data set"):
        builder("coco").build(datasets.Dataset.from_dict({"caption": [], "image": []}))
    message = (
        r"expected the columns \['caption', 'image'\] for the task coco, got \['image', 'text'\], without \['caption'\]"
    )
    with pytest.raises(ValueError, match=message):
        builder("coco").build(datasets.Dataset.from_dict({"text": ["a"], "image": [B]}))
    with pytest.raises(
        ValueError, match=r"expected fields among .* in the templates of x, .*name the columns of \['b'\]"
    ):
        Task("x", {"a": "a"}, [], ["a"], templates=["{a} {b}"])
    with pytest.raises(ValueError, match="expected a prompt among .*'canny'.* got 'edges'"):
        Task("x", {"a": "a"}, [], ["a"], prompt="edges")
    with pytest.raises(ValueError, match="expected the columns `width` and `height` for the boxes of x"):
        Task("x", {"a": "a"}, [], ["a"], templates=["{a}"], boxes={"fields": ["x0", "y0", "w", "h"]})


def test_boxes_in_pixels_with_a_width_and_a_height(builder):
    columns = {"caption": "c", "objects": "box", "names": "names", "width": "w", "height": "h", "image": "image"}
    coco = replace(TASKS["grounded"], columns=columns, boxes={"fields": ["x0", "y0", "w", "h"]})
    row = {"c": "pets", "box": [[0, 50, 50, 50]], "names": ["a dog"], "w": 100, "h": 100, "image": B}
    assert (
        "pets with segmentations a dog at <loc_0><loc_128><loc_128><loc_255>" in builder(coco).row(row, 0)["texts"][0]
    )


def test_the_readme_lists_the_tasks():
    for name, task in TASKS.items():
        source = task.dataset["data_files"] if task.dataset["path"] == "json" else task.dataset["path"]
        templates = "<br>".join(f"`{wording}`" for wording in dict.fromkeys(task.wordings))
        assert f"| {task.title} (`{name}`) | {source} | {task.licence} | {templates} |" in README


def test_the_readme_makes_a_mixture_of_tasks(processor, monkeypatch):
    pictures = {
        "image": draw("red", "circle"),
        "original_image": draw("red", "square"),
        "edited_image": draw("blue", "square"),
    }
    paths = {task.dataset["path"]: name for name, task in TASKS.items() if name in ("edit", "coco", "vqa2")}

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        row = ROWS[paths[path]]
        return datasets.Dataset.from_list([row | {name: pictures[name] for name in row if name in pictures}] * 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    scope = {"processor": processor}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], scope)
    table = scope["mixed"].with_format("arrow")[:]
    assert {*table["task"].to_pylist()} == {"edit", "coco", "vqa2"} and usable(table, processor.vocabulary).all()
    assert len(scope["transform"](table, np.random.default_rng(0))[1].lengths) == len(table) >= 12
