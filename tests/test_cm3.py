"""The CM3 objective: documents, spans that move and return, and batches that look like the prompts of generation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, TEXT_SIZE

from cm3leon_hf.data.cm3 import draw_span, move_span, restore, segments
from cm3leon_hf.data.documents import text_to_image_document
from cm3leon_hf.data.pretraining import CausalCollator, CM3Transform, balanced_rows
from cm3leon_hf.generation_branches import without_text

CODES = list(range(16))
IMAGE = [TEXT_SIZE + code for code in CODES]


@pytest.fixture
def document(vocabulary) -> list[int]:
    return text_to_image_document([300, 301, 302], IMAGE, vocabulary)


def draws(document, vocabulary, count=2000, **arguments) -> list:
    rng = np.random.default_rng(0)
    return [draw_span(document, vocabulary, rng, **arguments) for _ in range(count)]


def test_a_document_is_text_break_image(document, vocabulary):
    assert document == [1, 300, 301, 302, 2, *IMAGE, 1]
    assert segments(document, vocabulary) == [(1, 4), (5, 21)]


def test_moved_spans_come_back(document, vocabulary):
    spans = set(draws(document, vocabulary)) - {None}
    assert len(spans) > 100
    for start, stop in spans:
        moved = move_span(document, (start, stop), vocabulary)
        infill = moved.index(vocabulary.infill_id)
        assert moved[start] == vocabulary.mask_id
        assert moved[infill + 1 :] == [*document[start:stop], vocabulary.eos_id]
        assert moved.count(vocabulary.mask_id) == moved.count(vocabulary.infill_id) == 1
        assert restore(moved, vocabulary) == document


def test_no_span_leaves_the_document(document, vocabulary):
    assert move_span(document, None, vocabulary) == restore(document, vocabulary) == document
    assert set(draws([1, 2, 1], vocabulary, 50)) == {None}  # nothing to move


def test_spans_never_cross_a_break_or_an_end(vocabulary):
    document = [1, 300, 301, 2, *IMAGE[:4], 1, 302, 2, *IMAGE[4:7], 1]
    walls = {vocabulary.eos_id, vocabulary.break_id}
    spans = [span for span in draws(document, vocabulary) if span]
    assert all(start < stop and not walls & set(document[start:stop]) for start, stop in spans)
    assert {index for span in spans for index in range(*span)} == {1, 2, 4, 5, 6, 7, 9, 11, 12, 13}


def test_span_statistics(document, vocabulary):
    spans = draws(document, vocabulary)
    assert spans.count(None) / len(spans) == pytest.approx(math.exp(-1), abs=0.03)  # Poisson(1) draws none
    drawn = [span for span in spans if span]
    assert sum(span[1] <= 4 for span in drawn) / len(drawn) == pytest.approx(0.5, abs=0.04)  # either segment
    lengths = [stop - start for start, stop in drawn if start >= 5]
    assert np.mean(lengths) == pytest.approx((16 + 0.5) / 3 + 0.83, abs=0.5)  # of two uniform ends
    whole = [span for span in draws(document, vocabulary, whole_segment=1.0) if span]
    assert set(whole) == {(1, 4), (5, 21)}
    half = [span for span in draws(document, vocabulary, whole_segment=0.5) if span]
    counts = Counter(half)
    assert (counts[1, 4] + counts[5, 21]) / len(half) > 0.45
    rare = draws(document, vocabulary, span_rate=0.5)
    assert rare.count(None) / len(rare) == pytest.approx(math.exp(-0.5), abs=0.03)


@pytest.fixture
def transform(processor, vocabulary):
    def build(**arguments) -> CM3Transform:
        return CM3Transform(processor.tokenizer, vocabulary, np.random.default_rng(0), **arguments)

    return build


def test_documents_begin_with_the_prompts_of_generation(transform, processor, vocabulary):
    caption = "a red circle on white"
    prompt = processor.for_text_to_image([caption])["input_ids"][0]
    unguided = without_text(prompt, vocabulary).tolist()
    captioning = processor.for_image_to_text(image_codes=[CODES])["input_ids"][0].tolist()
    answer = [*processor.tokenizer(caption)["input_ids"], vocabulary.eos_id]
    build, seen = transform(whole_segment=1.0), set()
    for _ in range(60):
        ids = build.document([caption], CODES)
        if ids == [*prompt.tolist(), *IMAGE, vocabulary.eos_id]:
            seen.add("drawing")
        if ids[: len(unguided)] == unguided and ids == captioning + answer:
            seen.add("captioning")
    assert seen == {"drawing", "captioning"}


def test_instructions_are_captioning_prompts_with_their_answer(transform, processor, vocabulary):
    ids = transform(instruction_share=1.0).document(["a red circle"], CODES)
    prompt = processor.for_image_to_text(image_codes=[CODES], text="Describe the given picture.")["input_ids"][0]
    answer = processor.tokenizer(" a red circle")["input_ids"]
    assert ids == [*prompt.tolist(), *answer, vocabulary.eos_id]


def test_every_wording_is_drawn_and_a_seed_fixes_the_draws(transform):
    rows = {"captions": [CAPTIONS] * 40, "codes": [CODES] * 40}
    first, second = (transform(whole_segment=0.3, instruction_share=0.1)(rows)["input_ids"] for _ in range(2))
    assert first == second
    build = transform()
    plain = {tuple(restore(build.document(CAPTIONS, CODES), build.vocabulary)) for _ in range(200)}
    assert len(plain) == len(CAPTIONS)


def test_noise_changes_what_is_read_and_not_what_is_predicted(transform, vocabulary):
    rows = {"captions": [["a red circle"]] * 300, "codes": [CODES] * 300}
    batch = transform(image_noise=0.8, span_rate=0.0)(rows)
    read, predicted = (torch.tensor(batch[name]) for name in ("input_ids", "labels"))
    clean = transform(span_rate=0.0)(rows)["input_ids"]
    assert predicted.tolist() == clean and transform(span_rate=0.0)(rows)["labels"] == clean
    changed = read != predicted
    assert not changed[~vocabulary.is_image(predicted)].any() and vocabulary.is_image(read[changed]).all()
    shares = changed[vocabulary.is_image(predicted)].view(300, -1).float().mean(1)
    assert shares.mean() == pytest.approx(0.4 * 31 / 32, abs=0.03)  # one in 32 draws the token that was there
    assert shares.min() < 0.1 and shares.max() > 0.6


def test_balanced_rows_show_every_group_equally_often():
    groups = ["apple", "hand", "hand", "hand", "apple", "cup"]
    rows = balanced_rows(groups, 3)
    assert Counter(groups[row] for row in rows) == {"apple": 3, "hand": 3, "cup": 3}
    assert Counter(rows) == {0: 2, 4: 1, 1: 1, 2: 1, 3: 1, 5: 3}  # a group's rows take turns


def test_batches_have_padding_on_the_right_without_labels_or_mask(model, document, vocabulary):
    short = [1, 300, 2, *IMAGE, 1]
    batch = CausalCollator(pad_token_id=vocabulary.pad_id)([{"input_ids": document}, {"input_ids": short}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [document, [*short, 0, 0]]
    assert batch["labels"].tolist() == [document, [*short, -100, -100]]
    with torch.no_grad():
        alone = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in map(torch.tensor, ([document], [short]))]
        expected = sum(alone) / (len(document) + len(short) - 2)
        torch.testing.assert_close(model(**batch).loss, expected)
