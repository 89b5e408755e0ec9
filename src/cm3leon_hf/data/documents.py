"""Documents: in which order text and image ids stand, many documents laid end to end."""

from typing import NamedTuple

import numpy as np

from ..vocabulary import Vocabulary


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
        start, length (`np.ndarray`): Where a part lies in the common array.
        is_image (`np.ndarray`): Its modality.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    is_image: np.ndarray


def ends_to_offsets(lengths) -> np.ndarray:
    """Lengths `(count,)` to offsets `(count + 1,)`."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def take_pieces(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`source[start : start + length]` of every piece, laid end to end."""
    shift = starts - (np.cumsum(lengths) - lengths)  # from a place in the result to its place in the source
    return source[np.repeat(shift, lengths) + np.arange(lengths.sum())]


def join_parts(source: np.ndarray, parts: Parts, count: int, vocabulary: Vocabulary) -> Documents:
    """
    Writes documents: `<eos> part <break> part … <eos>`, with `<break>` at each change of modality (section 2.2).

    Caption–image and image–caption pairs, single texts and images, and interleaved documents differ only in their
    parts. Empty parts are left out, and neighbours of one modality are joined.

    Args:
        source (`np.ndarray`): Ids that the parts are runs of.
        parts ([`Parts`]): The parts of all documents.
        count (`int`): Number of documents.
        vocabulary ([`Vocabulary`]): Layout of the ids.

    Returns:
        [`Documents`]: `count` of them; one without parts is `<eos> <eos>`.
    """
    parts = Parts(*(column[parts.length > 0] for column in parts))
    first = np.diff(parts.document, prepend=-1) > 0
    breaks = ~first & (np.diff(parts.is_image.astype(np.int8), prepend=0) != 0)
    marks = len(source) + np.array([0, 1])  # <eos> and <break>, put behind the source
    number = np.arange(len(parts.document))
    opener = 2 * number + 2 * parts.document + 1  # every document has two pieces of its own, `<eos>` on either side
    starts, lengths = np.full(2 * len(number) + 2 * count, marks[0]), np.zeros(2 * len(number) + 2 * count, np.int64)
    starts[opener], lengths[opener] = marks[1], breaks
    starts[opener + 1], lengths[opener + 1] = parts.start, parts.length
    per_document = np.bincount(parts.document, minlength=count)
    ends = np.cumsum(2 * per_document + 2)
    lengths[ends - 1] = lengths[ends - 2 * per_document - 2] = 1
    ids = take_pieces(np.concatenate([source, [vocabulary.eos_id, vocabulary.break_id]]), starts, lengths)
    return Documents(ids, np.concatenate([[0], np.cumsum(lengths)[ends - 1]]))
