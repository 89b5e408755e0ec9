"""From rows of a table to what documents are made of: which texts and images a row holds, and in which order."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..vocabulary import Vocabulary

COLUMNS = ("captions", "texts", "codes", "answer", "retrieved")


class Cells(NamedTuple):
    """
    Texts, or images, of a table's rows, and where in its document each stands.

    Args:
        values (`pa.Array`): A string, or a list of codes, for each cell.
        row (`np.ndarray`): The cell's document.
        section (`np.ndarray`): Its section there; see [`~cm3leon_hf.data.documents.Parts`].
        place (`np.ndarray`): Its place among the section's parts.
    """

    values: pa.Array
    row: np.ndarray
    section: np.ndarray
    place: np.ndarray

    @classmethod
    def joined(cls, several: list["Cells"], kind: pa.DataType) -> "Cells":
        """All cells that hold something."""
        values = pa.chunked_array([cells.values.cast(kind) for cells in several], kind).combine_chunks()
        numbers = [np.concatenate([np.zeros(0, np.int64), *column]) for column in list(zip(*several))[1:]]
        kept = pc.is_valid(values)
        numbers = numbers or [np.zeros(0, np.int64)] * 3
        return cls(values.filter(kept), *(column[kept.to_numpy(zero_copy_only=False)] for column in numbers))


class Rows(NamedTuple):
    """
    What a table's rows hold.

    Args:
        texts, images ([`Cells`]): Strings, and codes as lists of 64 bit integers.
        own (`int`): The section of a row itself; retrieved documents have those below.
        answer (`np.ndarray` of shape `(rows,)`): Place of the part that is the output of a task; -1 for none.
    """

    texts: Cells
    images: Cells
    own: int
    answer: np.ndarray

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Which texts, and which images, are the outputs of their rows."""
        return tuple((c.section == self.own) & (c.place == self.answer[c.row]) for c in (self.texts, self.images))


def read_rows(table: pa.Table, rng: np.random.Generator, image_first: float = 0.0) -> Rows:
    """
    Reads rows of pairs, of single texts or images, and of interleaved documents.

    Args:
        table (`pa.Table`): Either the columns `captions` (a text, or a list of wordings of which one is drawn) and
            `codes` (one image's codes), each of which may be missing or null; or, interleaved as the corpora of the
            hub have it, `texts` and `codes` as lists of the same length, with null in the one where the other has the
            part. Beside them, `answer` is the number of the part that is the output of a task; null for none. The
            column `retrieved`, a list of `{text, codes}` with the best first, puts whole documents in front,
            the best last.
        rng (`np.random.Generator`): Source of all draws.
        image_first (`float`): Share of pairs whose image stands in front of the caption.

    Raises:
        ValueError: if `answer` holds no numbers.
    """
    rows = np.arange(len(table))
    texts, images = [], []
    if "retrieved" in table.column_names:
        row, place, found = _flat(table["retrieved"])
        from_last = np.bincount(row, minlength=len(table))[row] - 1 - place
        for cells, name, order in ((texts, "text", 0), (images, "codes", 1)):
            cells.append(Cells(pc.struct_field(found, name), row, from_last, np.full(len(row), order)))
    own = max((int(cells.section.max(initial=-1)) for cells in texts), default=-1) + 1
    section, answer = np.full(len(table), own), np.full(len(table), -1)
    if "texts" in table.column_names:
        for cells, name in ((texts, "texts"), (images, "codes")):
            row, place, values = _flat(table[name])
            cells.append(Cells(values, row, section[row], place))
        if "answer" in table.column_names:
            answer = _numbers(table["answer"])
    else:
        if "captions" in table.column_names:
            texts.append(Cells(_wordings(table["captions"], rng), rows, section, np.ones_like(rows)))
        if "codes" in table.column_names:
            first = rng.random(len(rows)) < image_first
            images.append(Cells(table["codes"].combine_chunks(), rows, section, np.where(first, 0, 2)))
    return Rows(Cells.joined(texts, pa.string()), Cells.joined(images, pa.list_(pa.int64())), own, answer)


def instructed(rows: Rows, wanted: np.ndarray, instruction: str) -> Rows:
    """
    Makes captioning examples of pairs: the instruction, the caption, which is the output, and the picture.

    Args:
        rows ([`Rows`]): Pairs, single texts and images, which stay as they are.
        wanted (`np.ndarray` of shape `(rows,)`): Which pairs.
        instruction (`str`): Such as "Describe the given picture."
    """
    texts, images, own, answer = rows
    both = np.intersect1d(texts.row[texts.section == own], images.row[images.section == own])
    both = both[wanted[both]]
    caption, picture = ((cells.section == own) & np.isin(cells.row, both) for cells in (texts, images))
    spoken = pc.binary_join_element_wise("", texts.values, " ")
    captions = texts._replace(values=pc.if_else(pa.array(caption, pa.bool_()), spoken, texts.values))
    first = Cells(pa.array([instruction] * len(both), pa.string()), both, np.full_like(both, own), np.zeros_like(both))
    answer = answer.copy()
    answer[both] = 1  # between the instruction and the picture
    images = images._replace(place=np.where(picture, 2, images.place))
    return Rows(Cells.joined([captions, first], pa.string()), images, own, answer)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column, -1 for null."""
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise ValueError(
            f"expected the column answer to hold the number of a part, got {column.type}; build such rows with "
            "cm3leon_hf.data.instructions"
        )
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy()


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Of the elements of a column of lists their row, their place in its list, and themselves."""
    values = lists.combine_chunks()
    row = pc.list_parent_indices(values).to_numpy().astype(np.int64)
    return row, np.arange(len(row)) - np.searchsorted(row, row), pc.list_flatten(values)


def _wordings(captions: pa.ChunkedArray, rng: np.random.Generator) -> pa.Array:
    if pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type):
        return captions.combine_chunks()
    row, _, wordings = _flat(captions)
    counts = np.bincount(row, minlength=len(captions))
    drawn = np.cumsum(counts) - counts + rng.integers(np.maximum(counts, 1))
    return wordings.take(pa.array(drawn, mask=counts == 0))


def usable(table: pa.Table, vocabulary: Vocabulary) -> np.ndarray:
    """
    Which rows `(rows,)` can be trained on: those with a text or an image, all of whose images are whole.

    A row whose image has another number of codes than the grid, or codes outside the codebook, is broken; so is one
    whose `answer` is no part of it, or an empty one.
    """
    rows = read_rows(table, np.random.default_rng(0))
    lengths = pc.list_value_length(rows.images.values).to_numpy().astype(np.int64)
    codes = pc.list_flatten(rows.images.values).to_numpy()
    wrong = np.flatnonzero((codes < 0) | (codes >= vocabulary.image_size))
    broken = lengths != vocabulary.image_length
    broken[np.searchsorted(np.cumsum(lengths), wrong, side="right")] = True
    filled = pc.greater(pc.utf8_length(rows.texts.values), 0).to_numpy(zero_copy_only=False)
    texts, images = rows.answers()
    held, answered, spoilt = (
        np.bincount(np.concatenate(found), minlength=len(table)) > 0
        for found in (
            (rows.texts.row[filled], rows.images.row),
            (rows.texts.row[filled & texts], rows.images.row[images]),
            (rows.images.row[broken],),
        )
    )
    return held & (answered | (rows.answer < 0)) & ~spoilt
