"""Packing: documents to sequences of one length."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .cm3 import Spans, move_spans, moved_lengths
from .documents import IGNORED, Documents
from .transform import CM3Transform


class Sequences(NamedTuple):
    """
    Packed sequences, every array of shape `(count, length)`.

    Args:
        input_ids (`np.ndarray`): What the model reads.
        labels (`np.ndarray`): What it is to predict, -100 on padding and on what is only read.
        position_ids (`np.ndarray`, *optional*): Positions that begin anew with each document, by which transformers'
            attention keeps documents apart. `None` where documents see those in front of them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray | None

    def take(self, order: np.ndarray) -> "Sequences":
        return Sequences(*(None if values is None else values[order] for values in self))


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """
    Best-fit decreasing: the longest document first, each into the sequence that it fills best.

    The rule of `trl.pack_dataset`, which packs whole data sets through `datasets.map`.

    Args:
        lengths (`np.ndarray`): Length of each document, at most `capacity`.
        capacity (`int`): Length of a sequence.

    Returns:
        `list[list[int]]`: The documents of each sequence.
    """
    sequences, room = [], []  # `room` is sorted: what is left, and of which sequence
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        index = bisect_left(room, (length, 0))
        left, sequence = room.pop(index) if index < len(room) else (capacity, len(sequences))
        if sequence == len(sequences):
            sequences.append([])
        sequences[sequence].append(document)
        insort(room, (left - length, sequence))
    return sequences


def uncut(documents: Documents, spans: Spans, length: int) -> Spans:
    """
    The spans that a stream of the documents can have when it is cut every `length` tokens.

    A cut through a document with moved spans would part a mask from its content, so such a document stays unmasked.
    """
    masked, start = [], 0
    for plain, moved in zip(documents.lengths.tolist(), moved_lengths(documents, spans).tolist()):
        whole = start % length + moved <= length
        masked.append(whole)
        start += moved if whole else plain
    return spans.of(np.array(masked, bool))


def lay(read: np.ndarray, documents: Documents, lengths: np.ndarray, length: int, pad_id: int, apart: bool):
    """
    Lays documents end to end into sequences.

    Args:
        read (`np.ndarray`): The ids that the model reads in place of the documents'.
        documents ([`Documents`]): In the order in which they are to stand.
        lengths (`np.ndarray` of shape `(count,)`): How many of the ids each sequence takes; padding fills the rest.
        length (`int`): Length of a sequence.
        pad_id (`int`): Id of padding.
        apart (`bool`): Whether each document has positions of its own and no document predicts the next one's begin.

    Returns:
        [`Sequences`].
    """
    filled = np.arange(length) < lengths[:, None]
    input_ids = np.full(filled.shape, pad_id)
    labels = np.full(filled.shape, IGNORED)
    input_ids[filled], labels[filled] = read, documents.ids
    if not apart:
        return Sequences(input_ids, labels, None)
    begins = np.zeros(len(read), bool)
    begins[documents.offsets[:-1]] = True
    first = np.ones(filled.shape, bool)
    first[filled] = begins
    first[:, 1:] &= filled[:, 1:] | filled[:, :-1]  # padding is one run
    labels[first] = IGNORED
    first[:, 0] = True
    place = np.arange(length)
    return Sequences(input_ids, labels, place - np.maximum.accumulate(np.where(first, place, 0), axis=1))


def pack(transform: CM3Transform, table: pa.Table, rng: np.random.Generator, apart: bool = False) -> Sequences:
    """
    Rows to packed sequences of `transform.max_length` tokens, in random order.

    With `overflow="drop"` no document is split: they are packed best-fit, and padding fills what is left. With
    `overflow="stream"` they stand end to end, and only the last sequence is padded.

    Args:
        transform ([`CM3Transform`]): What makes the documents.
        table (`pa.Table`): Rows; see [`~cm3leon_hf.data.rows.read_rows`].
        rng (`np.random.Generator`): Source of all draws.
        apart (`bool`): Whether documents of one sequence do not see each other.
    """
    length, vocabulary = transform.max_length, transform.vocabulary
    table = table.take(rng.permutation(len(table)))
    if transform.overflow == "stream":
        documents, spans = transform.documents(table, rng)
        moved = move_spans(documents, uncut(documents, spans, length), vocabulary)
        read, documents = transform.examples(moved, rng)
        lengths = np.full(-(-len(read) // length), length)
        lengths[-1:] -= -len(read) % length
    else:
        read, documents = transform(table, rng)
        bins = best_fit(documents.lengths, length)
        bins = [bins[index] for index in rng.permutation(len(bins))]
        order = np.array([document for sequence in bins for document in sequence], np.int64)
        lengths = np.array([documents.lengths[sequence].sum() for sequence in bins], np.int64)
        read = Documents(read, documents.offsets).take(order).ids
        documents = documents.take(order)
    return lay(read, documents, lengths, length, vocabulary.pad_id, apart)
