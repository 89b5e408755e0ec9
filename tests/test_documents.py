"""Documents of all kinds, and batches of them that look like the prompts of generation."""

from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CAPTIONS, TEXT_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon_hf.data.cm3 import restore
from cm3leon_hf.data.documents import Documents, Parts, drop_sections, join_parts
from cm3leon_hf.data.pretraining import CausalCollator, CM3Rows, balanced_rows
from cm3leon_hf.data.rows import usable
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.generation_branches import without_text

CODES = list(range(16))
IMAGE = [TEXT_SIZE + code for code in CODES]
DOCUMENT = [1, 300, 301, 302, 2, *IMAGE, 1]
parts_of_documents = st.lists(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.lists(st.integers(300, 400), max_size=5)), min_size=1, max_size=4).filter(
            lambda section: any(ids for _, ids in section)
        ),
        min_size=1,
        max_size=3,
    ),
    max_size=5,
)


def write(sections: list[list[tuple[bool, list[int]]]]) -> list[int]:
    """A document as the paper writes it, by a loop."""
    ids = []
    for section in sections:
        ids.append(1)
        held = [(image, part) for image, part in section if part]
        for index, (image, part) in enumerate(held):
            ids += [2] if index and image != held[index - 1][0] else []
            ids += part
    return [*ids, 1]


def flat(documents: list) -> tuple[np.ndarray, Parts]:
    """The parts' ids end to end, and where each part belongs."""
    rows = [
        (number, place, image, part)
        for number, sections in enumerate(documents)
        for place, section in enumerate(sections)
        for image, part in section
    ]
    laid = Documents.from_lists([row[3] for row in rows])
    columns = (np.array([row[index] for row in rows], kind) for index, kind in enumerate((np.int64, np.int64, bool)))
    return laid.ids, Parts(*columns, laid.offsets[:-1], laid.lengths)


@settings(max_examples=200, deadline=None)
@given(documents=parts_of_documents)
def test_documents_of_all_kinds(documents, vocabulary):
    ids, parts = flat(documents)
    assert join_parts(ids, parts, len(documents), vocabulary).tolist() == [write(sections) for sections in documents]


@settings(max_examples=200, deadline=None)
@given(documents=parts_of_documents, longest=st.integers(2, 40))
def test_retrieved_documents_are_dropped_from_the_front_until_the_rest_fits(documents, longest, vocabulary):
    ids, parts = flat(documents)
    kept = []
    for sections in documents:
        while len(sections) > 1 and len(write(sections)) > longest:
            sections = sections[1:]
        kept.append(write(sections))
    assert join_parts(ids, drop_sections(parts, longest), len(documents), vocabulary).tolist() == kept


@pytest.fixture(scope="session")
def ids_of(processor):
    return lambda text: processor.tokenizer(text)["input_ids"]


@pytest.fixture
def transform(processor, vocabulary):
    def build(**arguments) -> CM3Transform:
        return CM3Transform(processor.tokenizer, vocabulary, **{"max_length": 96, "span_rate": 0.0} | arguments)

    return build


def made(transform: CM3Transform, columns: dict, seed: int = 0) -> list[list[int]]:
    return transform(pa.table(columns), np.random.default_rng(seed))[1].tolist()


def test_pairs_and_single_texts_and_images(transform, ids_of):
    columns = {"captions": [["a red circle"], ["blue"], None, []], "codes": [CODES, None, CODES, CODES[::-1]]}
    text, other = ids_of("a red circle"), ids_of("blue")
    alone = [[1, *other, 1], [1, *IMAGE, 1], [1, *IMAGE[::-1], 1]]
    assert made(transform(), columns) == [[1, *text, 2, *IMAGE, 1], *alone]
    assert made(transform(image_first=1.0), columns) == [[1, *IMAGE, 2, *text, 1], *alone]
    assert made(transform(), {"captions": ["blue", None], "codes": [None, CODES]}) == [alone[0], alone[1]]
    assert made(transform(), {"captions": ["blue"]}) == [alone[0]] and made(transform(), {"codes": [CODES]})


def test_interleaved_documents(transform, ids_of):
    columns = {"texts": [["a", None, "b", "c"], [None, "d"]], "codes": [[None, CODES, None, None], [CODES, None]]}
    a, b, c, d = map(ids_of, "abcd")
    assert made(transform(), columns) == [[1, *a, 2, *IMAGE, 2, *b, *c, 1], [1, *IMAGE, 2, *d, 1]]


def test_retrieved_documents_stand_in_front_the_best_last(transform, ids_of):
    found = [{"text": "b", "codes": None, "score": 0.6}, {"text": "a", "codes": CODES, "score": 0.5}]
    columns = {"captions": ["c", "d"], "codes": [CODES, CODES], "retrieved": [found, []]}
    a, b, c, d = map(ids_of, "abcd")
    last = [1, *d, 2, *IMAGE, 1]
    assert made(transform(), columns) == [[1, *a, 2, *IMAGE, 1, *b, 1, *c, 2, *IMAGE, 1], last]
    assert made(transform(max_length=30), columns) == [[1, *b, 1, *c, 2, *IMAGE, 1], last]
    whole = made(transform(max_length=30, overflow="stream"), columns)
    assert len(whole[0]) == 30  # a document by itself is cut; in a stream it is not
    answered = made(transform(instruction_share=1.0, instruction="a"), columns)[0]
    assert answered == [1, *a, 2, *IMAGE, 1, *b, 1, *a, 3, 2, *IMAGE, 4, *ids_of(" c"), 1]


def test_a_document_that_only_fits_as_it_is_stays_unmasked(transform, vocabulary):
    columns = {"captions": ["a red circle on white"] * 50, "codes": [CODES] * 50}
    (plain,) = {tuple(ids) for ids in made(transform(), columns)}
    tight = {tuple(ids) for ids in made(transform(span_rate=9.0, max_length=len(plain) + 1), columns)}
    assert tight == {plain}
    room = made(transform(span_rate=9.0, max_length=len(plain) + 2), columns)
    assert all(len(ids) == len(plain) + 2 and restore(ids, vocabulary) == list(plain) for ids in room)
    cut = made(transform(max_length=7), columns)
    assert cut == [list(plain[:7])] * 50


def test_text_that_looks_like_a_special_token_is_text(transform, vocabulary):
    ids = made(transform(), {"captions": ["<mask> <eos> <loc_3>"]})[0]
    assert ids[0] == ids[-1] == vocabulary.eos_id and min(ids[1:-1]) >= len(vocabulary.special_tokens)


def test_documents_begin_with_the_prompts_of_generation(transform, processor, vocabulary):
    caption = "a red circle on white"
    prompt = processor.for_text_to_image([caption])["input_ids"][0]
    unguided = without_text(prompt, vocabulary).tolist()
    captioning = processor.for_image_to_text(image_codes=[CODES])["input_ids"][0].tolist()
    answer = [*processor.tokenizer(caption)["input_ids"], vocabulary.eos_id]
    build, seen = transform(whole_segment=1.0, span_rate=1.0), set()
    for ids in made(build, {"captions": [[caption]] * 60, "codes": [CODES] * 60}):
        if ids == [*prompt.tolist(), *IMAGE, vocabulary.eos_id]:
            seen.add("drawing")
        if ids[: len(unguided)] == unguided and ids == captioning + answer:
            seen.add("captioning")
    assert seen == {"drawing", "captioning"}


def test_guidance_leads_away_from_what_was_retrieved_too(processor, vocabulary):
    retrieved = [[{"text": "a red square", "codes": CODES}, {"text": "a blue circle", "codes": CODES}]]
    plain, behind = (
        processor.for_text_to_image(["a red circle"], found)["input_ids"][0] for found in (None, retrieved)
    )
    assert len(behind) > len(plain) + 2 * len(CODES)
    assert without_text(behind, vocabulary).tolist() == without_text(plain, vocabulary).tolist()
    assert without_text(plain, vocabulary).tolist() == [vocabulary.eos_id, vocabulary.mask_id, vocabulary.break_id]


def test_instructions_are_captioning_prompts_with_their_answer(transform, processor, vocabulary):
    columns = {"captions": ["blue", "a red circle"], "codes": [None, CODES]}
    text, ids = made(transform(instruction_share=1.0, image_first=1.0, span_rate=1.0, max_spans=1), columns)
    prompt = processor.for_image_to_text(image_codes=[CODES], text="Describe the given picture.")["input_ids"][0]
    answer = processor.tokenizer(" a red circle")["input_ids"]
    assert ids == [*prompt.tolist(), *answer, vocabulary.eos_id]
    assert restore(text, vocabulary) == [1, *processor.tokenizer("blue")["input_ids"], 1]


def test_every_wording_is_drawn_and_a_seed_fixes_the_draws(transform):
    columns = {"captions": [CAPTIONS] * 200, "codes": [CODES] * 200}
    build = transform(whole_segment=0.3, instruction_share=0.1, span_rate=1.0, image_noise=0.3)
    first, second = (build(pa.table(columns), np.random.default_rng(0)) for _ in range(2))
    assert first[0].tolist() == second[0].tolist() and first[1].tolist() == second[1].tolist()
    assert len({tuple(ids) for ids in made(transform(), columns)}) == len(CAPTIONS)


def test_noise_changes_what_is_read_and_not_what_is_predicted(transform, vocabulary):
    table = pa.table({"captions": ["a red circle"] * 300, "codes": [CODES] * 300})
    read, predicted = transform(image_noise=0.8)(table, np.random.default_rng(0))
    clean = transform()(table, np.random.default_rng(0))
    assert predicted.tolist() == clean[1].tolist() and np.array_equal(clean[0], clean[1].ids)
    changed, is_image = read != predicted.ids, predicted.ids >= TEXT_SIZE
    assert not changed[~is_image].any() and (read[changed] >= TEXT_SIZE).all()
    shares = changed[is_image].reshape(300, -1).mean(1)
    assert shares.mean() == pytest.approx(0.4 * 31 / 32, abs=0.03)  # one in 32 draws the token that was there
    assert shares.min() < 0.1 and shares.max() > 0.6


def test_a_row_becomes_the_same_document_whenever_it_is_read(transform):
    rows = datasets.Dataset.from_dict({"captions": [CAPTIONS] * 20, "codes": [CODES] * 20, "tone": [""] * 20})
    build = transform(whole_segment=0.3, span_rate=1.0, image_noise=0.3)
    data, again = (CM3Rows(rows, build, seed=1) for _ in range(2))
    first = [data[index] for index in range(20)]
    for index in reversed(range(20)):
        assert all(np.array_equal(again[index][name], first[index][name]) for name in ("input_ids", "labels"))
    again.set_epoch(1)
    assert len(data) == 20 and any(again[i]["labels"].tolist() != first[i]["labels"].tolist() for i in range(20))
    other = CM3Rows(rows, build, seed=2)
    assert any(other[i]["labels"].tolist() != first[i]["labels"].tolist() for i in range(20))


def test_broken_rows_are_found(vocabulary):
    captions = ["a", None, "", "a", "a", None, None]
    codes = [CODES, CODES, None, CODES[1:], [*CODES[1:], 32], None, [-1, *CODES[1:]]]
    assert usable(pa.table({"captions": captions, "codes": codes}), vocabulary).tolist() == [
        *(True, True, False, False, False, False, False)
    ]
    table = pa.table({"texts": [["a", None], [None, "b"]], "codes": [[None, CODES], [[1], None]]})
    assert usable(table, vocabulary).tolist() == [True, False]


def test_an_unknown_overflow_is_refused(transform):
    with pytest.raises(ValueError, match="overflow 'drop' or 'stream', got 'split'; choose one"):
        transform(overflow="split")


def test_balanced_rows_show_every_group_equally_often():
    groups = ["apple", "hand", "hand", "hand", "apple", "cup"]
    rows = balanced_rows(groups, 3)
    assert Counter(groups[row] for row in rows) == {"apple": 3, "hand": 3, "cup": 3}
    assert Counter(rows) == {0: 2, 4: 1, 1: 1, 2: 1, 3: 1, 5: 3}  # a group's rows take turns


def test_batches_have_padding_on_the_right_without_labels_or_mask(model, vocabulary):
    short = [1, 300, 2, *IMAGE, 1]
    batch = CausalCollator(pad_token_id=vocabulary.pad_id)([{"input_ids": DOCUMENT}, {"input_ids": short}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [DOCUMENT, [*short, 0, 0]]
    assert batch["labels"].tolist() == [DOCUMENT, [*short, -100, -100]]
    with torch.no_grad():
        alone = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in map(torch.tensor, ([DOCUMENT], [short]))]
        expected = sum(alone) / (len(DOCUMENT) + len(short) - 2)
        torch.testing.assert_close(model(**batch).loss, expected)
