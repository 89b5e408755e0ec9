"""Documents: in which order text and image ids stand, many documents laid end to end."""

from typing import NamedTuple

import numpy as np

from ..processing_prompts import fitting_sections
from ..vocabulary import Vocabulary

IGNORED = -100  # the label of what is not to be predicted


class Documents(NamedTuple):
    """
    Documents laid end to end.

    Args:
        ids (`np.ndarray` of shape `(total_length,)`): Vocabulary ids.
        offsets (`np.ndarray` of shape `(count + 1,)`): Document `d` is `ids[offsets[d]:offsets[d + 1]]`.
    """

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, lists: list) -> "Documents":
        ids = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, lists)]).astype(np.int64)
        return cls(ids, ends_to_offsets([len(ids) for ids in lists]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def tolist(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.ids, self.offsets[1:-1])] if len(self.lengths) else []

    def cut(self, length: int) -> "Documents":
        """The first `length` ids of each document."""
        lengths = np.minimum(self.lengths, length)
        return Documents(take_pieces(self.ids, self.offsets[:-1], lengths), ends_to_offsets(lengths))

    def take(self, order: np.ndarray) -> "Documents":
        """The documents of these numbers, in this order."""
        return Documents(
            take_pieces(self.ids, self.offsets[order], self.lengths[order]), ends_to_offsets(self.lengths[order])
        )


class Parts(NamedTuple):
    """
    What documents are made of: runs of a common array of ids, in the order in which they are to stand.

    Args:
        document (`np.ndarray`): The document of each part, ascending.
        section (`np.ndarray`): Ascending in a document: retrieved documents stand in front of it, each a section.
        is_image (`np.ndarray`): Its modality.
        start, length (`np.ndarray`): Where a part lies in the common array.
    """

    document: np.ndarray
    section: np.ndarray
    is_image: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def where(self, kept: np.ndarray) -> "Parts":
        return Parts(*(column[kept] for column in self))

    def leads(self) -> tuple[np.ndarray, np.ndarray]:
        """Which parts begin a section, so that `<eos>` leads them, and which change modality, with `<break>`."""
        begins = (np.diff(self.document, prepend=-1) != 0) | (np.diff(self.section, prepend=-1) != 0)
        return begins, ~begins & (np.diff(self.is_image.astype(np.int8), prepend=0) != 0)


def ends_to_offsets(lengths) -> np.ndarray:
    """Lengths `(count,)` to offsets `(count + 1,)`."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def take_pieces(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`source[start : start + length]` of every piece, laid end to end."""
    shift = starts - (np.cumsum(lengths) - lengths)  # from a place in the result to its place in the source
    return source[np.repeat(shift, lengths) + np.arange(lengths.sum())]


def drop_sections(parts: Parts, max_length: int) -> Parts:
    """
    Leaves out whole retrieved documents, from the front, until each document fits (`overflow="drop"`; ours).

    Args:
        parts ([`Parts`]): The parts of all documents.
        max_length (`int`): Longest document, in tokens; one whose last section alone is longer keeps that section.

    Returns:
        [`Parts`] of the sections that stay.
    """
    parts = parts.where(parts.length > 0)
    begins, breaks = parts.leads()
    section = np.cumsum(begins) - 1  # of all documents, counted through
    lengths = np.bincount(section, parts.length + begins + breaks)
    kept = fitting_sections(lengths, parts.document[begins], max_length - 1)  # with the closing `<eos>`
    return parts.where(kept[section])


def join_parts(source: np.ndarray, parts: Parts, count: int, vocabulary: Vocabulary) -> Documents:
    """
    Writes documents: `<eos> part <break> part … <eos>`, with `<break>` at each change of modality (section 2.2).

    Caption–image and image–caption pairs, single texts and images, and interleaved documents differ only in their
    parts. Empty parts are left out, neighbours of one modality are joined, and a new section begins with `<eos>`.

    Args:
        source (`np.ndarray`): Ids that the parts are runs of.
        parts ([`Parts`]): The parts of all documents, each with at least one that is not empty.
        count (`int`): Number of documents.
        vocabulary ([`Vocabulary`]): Layout of the ids.

    Returns:
        [`Documents`]: `count` of them.
    """
    parts = parts.where(parts.length > 0)
    begins, breaks = parts.leads()
    marks = np.array([vocabulary.eos_id, vocabulary.break_id])
    lead = 2 * np.arange(len(begins)) + parts.document  # two pieces for a part, one for each document's last `<eos>`
    last = np.cumsum(2 * np.bincount(parts.document, minlength=count) + 1) - 1
    starts, lengths = np.full(2 * len(begins) + count, len(source)), np.ones(2 * len(begins) + count, np.int64)
    starts[lead], lengths[lead] = len(source) + breaks, begins | breaks
    starts[lead + 1], lengths[lead + 1] = parts.start, parts.length
    ids = take_pieces(np.concatenate([source, marks]), starts, lengths)
    return Documents(ids, np.concatenate([[0], np.cumsum(lengths)[last]]))
