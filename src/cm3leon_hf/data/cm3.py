"""The CM3 objective: spans move to the document's end and leave masks behind (paper, section 2.2)."""

from typing import NamedTuple

import numpy as np

from ..vocabulary import Vocabulary
from .documents import Documents, ends_to_offsets, take_pieces

TRIES = 16  # draws of one span at most until it overlaps no other


class Spans(NamedTuple):
    """
    Runs of documents laid end to end.

    Args:
        document (`np.ndarray` of shape `(count,)`): The document that each lies in, ascending.
        start, stop (`np.ndarray` of shape `(count,)`): Where it begins and ends among the ids of all documents.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def of(self, chosen: np.ndarray) -> "Spans":
        """The spans in documents that `chosen` `(documents,)` is true for."""
        return Spans(*(column[chosen[self.document]] for column in self))

    def ordered(self) -> "Spans":
        """The spans in the order of the ids."""
        order = np.argsort(self.start, kind="stable")
        return Spans(*(column[order] for column in self))


def segments(documents: Documents, vocabulary: Vocabulary) -> Spans:
    """Maximal runs of ids without `<eos>` or `<break>`, the places a span may lie in."""
    walls = np.flatnonzero((documents.ids == vocabulary.eos_id) | (documents.ids == vocabulary.break_id))
    starts = np.sort(np.concatenate([walls + 1, documents.offsets[:-1]]))
    stops = np.sort(np.concatenate([walls, documents.offsets[1:]]))
    kept = starts < stops
    owner = np.searchsorted(documents.offsets, starts[kept], side="right") - 1
    return Spans(owner, starts[kept], stops[kept])


def draw_spans(
    documents: Documents,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    span_rate: float = 1.0,
    max_spans: int = 1,
    whole_segment: float = 0.0,
) -> Spans:
    """
    Draws spans to move.

    Their number is Poisson(`span_rate`), clipped to `max_spans`; none leaves a plain causal document. A span lies in
    one segment, drawn uniformly, and its ends are uniform there, so it has at least one token and never crosses
    `<break>` or `<eos>`. One that overlaps another of its document is drawn again, and left out where no room is
    found.

    Args:
        documents ([`Documents`]): What to draw from.
        vocabulary ([`Vocabulary`]): Layout of the ids.
        rng (`np.random.Generator`): Source of all draws.
        span_rate (`float`): Mean of the Poisson distribution; the paper's is 1. A lower one leaves more documents
            whole.
        max_spans (`int`): Most spans of a document. Ours: one, with the paper's single `<mask>`; more need a
            vocabulary with as many masks.
        whole_segment (`float`): Share of spans that are their whole segment. Ours, for small models: a masked text
            in front of its image is both the prompt without text of guidance and half of a captioning example, and
            uniform ends almost never draw it.

    Returns:
        [`Spans`] in order.

    Raises:
        ValueError: if the vocabulary has fewer masks than `max_spans`.
    """
    if not 1 <= max_spans <= vocabulary.num_masks:
        raise ValueError(
            f"expected max_spans from 1 to the vocabulary's {vocabulary.num_masks} masks, got {max_spans}; "
            "raise num_masks in the model's configuration"
        )
    places = segments(documents, vocabulary)
    per_document = np.bincount(places.document, minlength=len(documents.lengths))
    first = np.cumsum(per_document) - per_document
    wanted = np.minimum(rng.poisson(span_rate, len(per_document)), max_spans) * (per_document > 0)
    starts, stops = np.zeros((2, len(wanted), max_spans), np.int64)  # `(documents, max_spans)` each, empty so far
    for index in range(wanted.max(initial=0)):
        pending = np.flatnonzero(wanted > index)
        for _ in range(TRIES):
            place = first[pending] + rng.integers(per_document[pending])
            start, stop = _draw_ends(places.start[place], places.stop[place], rng, whole_segment)
            free = ((stop[:, None] <= starts[pending]) | (start[:, None] >= stops[pending])).all(1)
            starts[pending[free], index], stops[pending[free], index] = start[free], stop[free]
            pending = pending[~free]
            if not len(pending):
                break
    owner, index = np.nonzero(starts < stops)
    return Spans(owner, starts[owner, index], stops[owner, index]).ordered()


def _draw_ends(start: np.ndarray, stop: np.ndarray, rng: np.random.Generator, whole_segment: float) -> tuple:
    ends = np.sort(rng.integers(start, stop, size=(2, len(start))), axis=0)
    whole = rng.random(len(start)) < whole_segment
    return np.where(whole, start, ends[0]), np.where(whole, stop, ends[1] + 1)


def moved_lengths(documents: Documents, spans: Spans) -> np.ndarray:
    """Lengths `(documents,)` after [`move_spans`]: two tokens more for the first span, three for each further one."""
    counts = np.bincount(spans.document, minlength=len(documents.lengths))
    return documents.lengths + np.maximum(3 * counts - 1, 0)


def move_spans(documents: Documents, spans: Spans, vocabulary: Vocabulary) -> Documents:
    """
    Moves spans: `a s b t c <eos>` becomes `a <mask> b <mask:1> c <infill> s <eos> <infill:1> t <eos>`.

    The document's closing `<eos>` closes the first moved span, so that what was last is followed by `<infill>` as in
    the prompt. Documents without a span stay as they are.

    Args:
        documents ([`Documents`]): Each ends with `<eos>`.
        spans ([`Spans`]): In order, none overlapping another, as [`draw_spans`] returns them.
        vocabulary ([`Vocabulary`]): Layout of the ids, with a mask for every span of a document.

    Returns:
        [`Documents`] as many as there were, [`moved_lengths`] long.
    """
    per_document = np.bincount(spans.document, minlength=len(documents.lengths))
    pieces = 5 * per_document + 1  # of each span what stands before it, mask, `<infill>`, itself, `<eos>`; and the rest
    base, last = np.cumsum(pieces) - pieces, 2 * per_document
    rank = np.arange(len(spans.document)) - np.searchsorted(spans.document, spans.document)
    mask = base[spans.document] + 2 * rank + 1
    infill = base[spans.document] + last[spans.document] + 3 * rank + 1
    marks = np.array([*vocabulary.mask_ids, *vocabulary.infill_ids, vocabulary.eos_id])
    source, before = np.concatenate([documents.ids, marks]), len(documents.ids)
    starts, stops = np.zeros((2, pieces.sum()), np.int64)
    starts[base] = documents.offsets[:-1]
    starts[mask + 1], stops[mask - 1] = spans.stop, spans.start
    stops[base + last] = documents.offsets[1:] - (per_document > 0)
    starts[mask], starts[infill] = before + rank, before + vocabulary.num_masks + rank
    starts[infill + 1], stops[infill + 1] = spans.start, spans.stop
    starts[infill + 2] = before + len(marks) - 1
    for mark in (mask, infill, infill + 2):
        stops[mark] = starts[mark] + 1
    return Documents(take_pieces(source, starts, stops - starts), ends_to_offsets(moved_lengths(documents, spans)))


def restore(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Puts the moved spans of one document back in their places; the inverse of [`move_spans`]."""
    if vocabulary.infill_id not in ids:
        return ids
    spans, end = {}, ids.index(vocabulary.infill_id)
    body, rest = ids[:end], ids[end:]
    for mask, infill in zip(vocabulary.mask_ids, vocabulary.infill_ids):
        if rest and rest[0] == infill:
            stop = rest.index(vocabulary.eos_id)
            spans[mask], rest = rest[1:stop], rest[stop + 1 :]
    return [id for token in body for id in spans.get(token, [token])] + [vocabulary.eos_id]
