"""Rows of tasks: documents that are the prompts of generation, and which of their tokens are predicted."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import TEXT_SIZE

from cm3leon_hf.data.cm3 import restore
from cm3leon_hf.data.packing import pack
from cm3leon_hf.data.pretraining import CausalCollator, CM3Rows
from cm3leon_hf.data.rows import usable
from cm3leon_hf.data.transform import CM3Transform

CODES = list(range(16))
IMAGE = [TEXT_SIZE + code for code in CODES]
CAPTIONING = {
    "texts": ["Describe the given picture.", " a red circle", None],
    "codes": [None, None, CODES],
    "answer": 1,
}
QUESTION = {"texts": ["Question: red? Answer:", " a", ".", None], "codes": [None] * 3 + [CODES], "answer": 1}
EDITING = {
    "texts": ["Edit first image following the instruction", None, "blue", None],
    "codes": [None, CODES, None, CODES[::-1]],
    "answer": 3,
}
PAIR = {"texts": ["a red circle", None], "codes": [None, CODES], "answer": None}


@pytest.fixture
def transform(processor, vocabulary):
    def build(**arguments) -> CM3Transform:
        return CM3Transform(processor.tokenizer, vocabulary, **{"max_length": 96, "answer_share": 1.0} | arguments)

    return build


def made(transform: CM3Transform, rows: list[dict], seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """What is read, and what is predicted, of each row."""
    read, documents = transform(pa.Table.from_pylist(rows), np.random.default_rng(seed))
    return documents._replace(ids=read).tolist(), documents.tolist()


@pytest.fixture(scope="session")
def ids_of(processor):
    return lambda text: processor.tokenizer(text)["input_ids"]


def test_answers_stand_behind_their_prompts(transform, processor, ids_of):
    (captioning, question, editing), _ = made(transform(), [CAPTIONING, QUESTION, EDITING])
    prompt = processor.for_image_to_text(image_codes=[CODES], text="Describe the given picture.")["input_ids"][0]
    assert captioning == [*prompt.tolist(), *ids_of(" a red circle"), 1]
    prompt = processor(text="Question: red? Answer:<mask>.<break><image><infill>", image_codes=[CODES])["input_ids"][0]
    assert question == [*prompt.tolist(), *ids_of(" a"), 1]
    text = "Edit first image following the instruction<break><image><break>blue<break>"
    prompt = processor(text=text, image_codes=[CODES])["input_ids"][0]
    assert editing == [*prompt.tolist(), *IMAGE[::-1], 1]


def test_a_share_of_answers_is_moved_and_the_others_have_random_spans(transform, vocabulary):
    read, _ = made(transform(answer_share=0.5, span_rate=9.0), [CAPTIONING, EDITING] * 200)
    moved = made(transform(), [CAPTIONING, EDITING])[0]
    plain = made(transform(answer_share=0.0, span_rate=0.0), [CAPTIONING, EDITING])[0]
    for kind in (0, 1):
        rows = read[kind::2]
        assert sum(ids == moved[kind] for ids in rows) / 200 == pytest.approx(0.5, abs=0.1)
        assert all(restore(ids, vocabulary) == plain[kind] for ids in rows) and len({*map(tuple, rows)}) > 30


@pytest.mark.parametrize("row", [CAPTIONING, QUESTION, EDITING])
def test_completion_only_loss_counts_the_output_and_its_end(transform, ids_of, row):
    output = IMAGE[::-1] if row is EDITING else ids_of(row["texts"][1])
    (read,), (labels,) = made(transform(completion_only_loss=True, image_noise=0.5), [row])
    assert len(read) == len(labels) and labels == [-100] * (len(labels) - len(output) - 1) + [*output, 1]
    (_,), (unmoved,) = made(transform(completion_only_loss=True, answer_share=0.0, span_rate=0.0), [row])
    assert [id for id in unmoved if id != -100] == output + [1] * (row is EDITING)
    for seed in range(20):  # however the output is cut into spans, all of it counts and no mark does
        (_,), (labels,) = made(transform(completion_only_loss=True, answer_share=0.0, span_rate=9.0), [row], seed)
        assert sorted(id for id in labels if id not in (-100, 1)) == sorted(output)


def test_rows_without_an_answer_are_predicted_whole(transform):
    ids, (captioning, pair) = made(transform(completion_only_loss=True, span_rate=0.0), [CAPTIONING, PAIR])
    assert pair == ids[1] and captioning != ids[0]


def test_instructions_and_tasks_of_captioning_are_the_same(transform):
    asked = transform(instruction_share=1.0, completion_only_loss=True)
    pairs = made(asked, [{"captions": "a red circle", "codes": CODES}])
    assert pairs == made(asked, [CAPTIONING])


def test_box_coordinates_are_single_ids_and_nothing_else_is_special(transform, processor, vocabulary):
    text = "red at <loc_0><loc_3> <loc_255>, <loc_256> <loc_03> <mask>"
    row = {"texts": [text, None], "codes": [None, CODES], "answer": 1}
    (ids,) = made(transform(), [row])[0]
    words = processor.tokenizer(text.replace("<mask>", ""))["input_ids"]
    assert ids[1 : 1 + len(words)] == words
    assert [id for id in ids[1:-1] if id < len(vocabulary.special_tokens)] == [6, 9, 261, vocabulary.break_id]
    (plain,) = made(transform(span_rate=0.0), [row | {"answer": None}])[0]
    assert min(plain[1 : plain.index(vocabulary.break_id)]) >= len(vocabulary.special_tokens)
    found = [{"text": "<loc_3>", "codes": None}]
    (retrieved,) = made(transform(), [row | {"retrieved": found}])[0]
    assert sum(id == 9 for id in retrieved) == 1


@pytest.mark.parametrize("overflow", ["drop", "stream"])
def test_packed_labels_are_those_of_the_documents(transform, overflow):
    table = pa.Table.from_pylist([CAPTIONING, QUESTION, EDITING] * 10)
    build = transform(completion_only_loss=True, overflow=overflow, span_rate=0.0, max_length=300)
    labels = pack(build, table, np.random.default_rng(0)).labels
    _, documents = build(table, np.random.default_rng(0))
    assert set(labels[labels < 0]) == {-100}
    moved = labels[labels >= 0] if overflow == "drop" else labels[labels >= TEXT_SIZE]
    expected = documents.ids[documents.ids >= (0 if overflow == "drop" else TEXT_SIZE)]
    assert sorted(moved.tolist()) == sorted(expected.tolist())  # a cut leaves some answers where they were


def test_batches_keep_the_labels(transform, ids_of):
    rows = CM3Rows(datasets.Dataset.from_list([CAPTIONING, EDITING]), transform(completion_only_loss=True), seed=0)
    labels = CausalCollator(pad_token_id=0)([rows[0], rows[1]])["labels"]
    assert labels.ne(-100).sum(1).tolist() == [len(ids_of(" a red circle")) + 1, len(IMAGE) + 1]


def test_rows_whose_answer_is_no_part_or_empty_are_broken(vocabulary):
    rows = [CAPTIONING, EDITING, PAIR, CAPTIONING | {"answer": 3}, CAPTIONING | {"texts": ["a", "", None]}]
    assert usable(pa.Table.from_pylist(rows), vocabulary).tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match="answer to hold the number of a part, got string"):
        usable(pa.Table.from_pylist([CAPTIONING | {"answer": "red"}]), vocabulary)
