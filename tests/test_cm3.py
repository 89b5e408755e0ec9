"""The CM3 objective: spans that move and return."""

import math
from collections import Counter

import numpy as np
import pytest
from conftest import TEXT_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon_hf.data.cm3 import Spans, draw_spans, move_spans, moved_lengths, restore, segments
from cm3leon_hf.data.documents import Documents
from cm3leon_hf.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=TEXT_SIZE, image_size=32, grid_size=4, num_masks=5)
EOS, BREAK = VOCABULARY.eos_id, VOCABULARY.break_id
IMAGE = [TEXT_SIZE + code for code in range(16)]
DOCUMENT = [EOS, 300, 301, 302, BREAK, *IMAGE, EOS]
words = st.lists(st.one_of(st.integers(300, TEXT_SIZE + 31), st.sampled_from([EOS, BREAK])), max_size=40)
packs = st.lists(words.map(lambda ids: [EOS, *ids, EOS]), max_size=6)
draws = {"span_rate": st.floats(0, 8), "max_spans": st.integers(1, 5), "whole_segment": st.floats(0, 1)}


def draw(document: list[int], count: int = 2000, **arguments) -> list[list[tuple[int, int]]]:
    """The spans of many copies of a document, counted from its beginning."""
    spans = draw_spans(Documents.from_lists([document] * count), VOCABULARY, np.random.default_rng(0), **arguments)
    found = [[] for _ in range(count)]
    for owner, start, stop in zip(*map(np.ndarray.tolist, spans)):
        found[owner].append((start - owner * len(document), stop - owner * len(document)))
    return found


def move(document: list[int], spans: list[tuple[int, int]]) -> list[int]:
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    return move_spans(
        Documents.from_lists([document]), Spans(np.zeros_like(starts), starts, stops), VOCABULARY
    ).tolist()[0]


def test_a_span_moves_behind_infill_and_closes_with_eos():
    mask, infill = VOCABULARY.mask_id, VOCABULARY.infill_id
    assert move([EOS, 300, 301, BREAK, *IMAGE, EOS], [(1, 3)]) == [EOS, mask, BREAK, *IMAGE, infill, 300, 301, EOS]


def test_several_spans_have_masks_of_their_own_and_keep_their_order():
    moved = move([EOS, 300, 301, 302, BREAK, *IMAGE, EOS], [(1, 2), (2, 3), (20, 21)])
    masks, infills = VOCABULARY.mask_ids, VOCABULARY.infill_ids
    body = [EOS, masks[0], masks[1], 302, BREAK, *IMAGE[:15], masks[2]]
    assert moved == body + [infills[0], 300, EOS, infills[1], 301, EOS, infills[2], IMAGE[15], EOS]


def test_without_a_span_a_document_stays():
    assert move(DOCUMENT, []) == restore(DOCUMENT, VOCABULARY) == DOCUMENT
    assert draw([EOS, BREAK, EOS], 50) == [[]] * 50  # nothing to move


@settings(max_examples=200, deadline=None)
@given(lists=packs, seed=st.integers(0, 2**32), **draws)
def test_any_documents_any_spans(lists, seed, span_rate, max_spans, whole_segment):
    documents = Documents.from_lists(lists)
    rng = np.random.default_rng(seed)
    spans = draw_spans(documents, VOCABULARY, rng, span_rate, max_spans, whole_segment)
    moved = move_spans(documents, spans, VOCABULARY)
    assert [restore(ids, VOCABULARY) for ids in moved.tolist()] == lists
    assert moved.lengths.tolist() == moved_lengths(documents, spans).tolist()
    assert max(np.bincount(spans.document), default=0) <= max_spans
    inside = zip(*map(np.ndarray.tolist, spans))
    assert all(start < stop and not {EOS, BREAK} & {*documents.ids[start:stop].tolist()} for _, start, stop in inside)
    assert (spans.start[1:] >= spans.stop[:-1]).all()  # in order, apart
    for before, after in zip(lists, moved.tolist()):
        count = sum(id in VOCABULARY.mask_ids for id in after)
        assert [id for id in after if id in VOCABULARY.mask_ids] == VOCABULARY.mask_ids[:count]
        assert [id for id in after if id in VOCABULARY.infill_ids] == VOCABULARY.infill_ids[:count]
        assert after[-1] == EOS and len(after) == len(before) + max(3 * count - 1, 0)


@settings(max_examples=50, deadline=None)
@given(lists=packs, spans=st.data())
def test_many_documents_move_as_each_by_itself(lists, spans):
    documents = Documents.from_lists(lists)
    drawn = draw_spans(documents, VOCABULARY, np.random.default_rng(0), 2.0, 3)
    together = move_spans(documents, drawn, VOCABULARY).tolist()
    for index, ids in enumerate(lists):
        own, begin = drawn.of(np.arange(len(lists)) == index), documents.offsets[index]
        assert together[index] == move(ids, list(zip(own.start - begin, own.stop - begin)))


def test_spans_lie_anywhere_but_on_a_break_or_an_end():
    document = [EOS, 300, 301, BREAK, *IMAGE[:4], EOS, 302, BREAK, *IMAGE[4:7], EOS]
    found = segments(Documents.from_lists([document, document]), VOCABULARY)
    assert list(zip(*found)) == [
        (owner, start + 15 * owner, stop + 15 * owner)
        for owner in (0, 1)
        for start, stop in ((1, 3), (4, 8), (9, 10), (11, 14))
    ]
    spans = {span for spans in draw(document) for span in spans}
    assert {index for span in spans for index in range(*span)} == {1, 2, 4, 5, 6, 7, 9, 11, 12, 13}


def test_the_number_of_spans_is_poisson():
    counts = Counter(len(spans) for spans in draw(DOCUMENT, 4000, max_spans=5, span_rate=1.0))
    for count in range(3):
        assert counts[count] / 4000 == pytest.approx(math.exp(-1) / math.factorial(count), abs=0.03)
    clipped = Counter(len(spans) for spans in draw(DOCUMENT, max_spans=1, span_rate=0.5))
    assert clipped[0] / 2000 == pytest.approx(math.exp(-0.5), abs=0.03) and set(clipped) == {0, 1}


def test_segments_and_ends_are_uniform():
    drawn = [span for spans in draw(DOCUMENT) for span in spans]
    assert sum(span[1] <= 4 for span in drawn) / len(drawn) == pytest.approx(0.5, abs=0.04)  # either segment
    lengths = [stop - start for start, stop in drawn if start >= 5]
    assert np.mean(lengths) == pytest.approx((16 + 0.5) / 3 + 0.83, abs=0.5)  # of two uniform ends
    whole = draw(DOCUMENT, whole_segment=1.0, max_spans=2, span_rate=5.0)
    assert {tuple(spans) for spans in whole if len(spans) == 2} == {((1, 4), (5, 21))}
    half = Counter(span for spans in draw(DOCUMENT, whole_segment=0.5) for span in spans)
    assert (half[1, 4] + half[5, 21]) / half.total() > 0.45


def test_more_spans_than_masks_are_refused():
    documents = Documents.from_lists([DOCUMENT])
    with pytest.raises(ValueError, match="max_spans from 1 to the vocabulary's 5 masks, got 6; raise num_masks"):
        draw_spans(documents, VOCABULARY, np.random.default_rng(0), max_spans=6)
