"""The CM3 objective: a span moves to the document's end and leaves a mask behind (paper, section 2.2)."""

import numpy as np

from ..vocabulary import Vocabulary


def segments(ids: list[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Maximal runs `[start, stop)` of ids without `<eos>` or `<break>`, the places a span may lie in."""
    walls = [-1] + [i for i, id in enumerate(ids) if id in (vocabulary.eos_id, vocabulary.break_id)] + [len(ids)]
    return [(left + 1, right) for left, right in zip(walls, walls[1:]) if left + 1 < right]


def draw_span(
    ids: list[int],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    whole_segment: float = 0.0,
    span_rate: float = 1.0,
) -> tuple[int, int] | None:
    """
    Draws a span to move, or none.

    The number of spans is Poisson(`span_rate`), clipped to one; none leaves a plain causal document. The span lies in
    one segment, drawn uniformly, and its ends are uniform there, so it never crosses `<break>` or `<eos>`.

    Args:
        ids (`list[int]`): A document.
        vocabulary ([`Vocabulary`]): Layout of the ids.
        rng (`np.random.Generator`): Source of all draws.
        whole_segment (`float`): Share of spans that are their whole segment. Ours, for small models: a masked text
            in front of its image is both the prompt without text of guidance and half of a captioning example, and
            uniform ends almost never draw it.
        span_rate (`float`): Mean of the Poisson distribution; the paper's is 1. A lower one leaves more documents
            whole.

    Returns:
        `(start, stop)` with `start < stop`, or `None`.
    """
    places = segments(ids, vocabulary)
    if rng.poisson(span_rate) == 0 or not places:
        return None
    start, stop = places[rng.integers(len(places))]
    if rng.random() < whole_segment:
        return start, stop
    first, last = sorted(rng.integers(start, stop, size=2))
    return int(first), int(last) + 1


def move_span(ids: list[int], span: tuple[int, int] | None, vocabulary: Vocabulary) -> list[int]:
    """
    Moves a span: `a span b <eos>` becomes `a <mask> b <infill> span <eos>`; without a span nothing changes.

    The document's closing `<eos>` closes the moved span, so the image is followed by `<infill>` as in the prompt.
    """
    if span is None:
        return ids
    start, stop = span
    body = ids[:-1] if ids[-1] == vocabulary.eos_id else ids
    return [*body[:start], vocabulary.mask_id, *body[stop:], vocabulary.infill_id, *body[start:stop], vocabulary.eos_id]


def restore(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Puts a moved span back in its place; the inverse of [`move_span`]."""
    if vocabulary.infill_id not in ids:
        return ids
    infill, mask = ids.index(vocabulary.infill_id), ids.index(vocabulary.mask_id)
    span = ids[infill + 1 : -1]
    return [*ids[:mask], *span, *ids[mask + 1 : infill], ids[-1]]
