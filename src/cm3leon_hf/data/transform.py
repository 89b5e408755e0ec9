"""The CM3 transform: rows of a table to training documents."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ..vocabulary import Vocabulary
from .cm3 import Spans, draw_spans, move_spans, moved_lengths
from .documents import Documents, Parts, drop_sections, join_parts
from .rows import Rows, read_rows


class Asked(NamedTuple):
    """Rows that are captioning examples with an instruction, and the lengths of answer and image, in tokens."""

    row: np.ndarray
    answer: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class CM3Transform:
    """
    Turns rows into training documents. Pure: the same rows and the same generator give the same documents.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Text tokenizer.
        vocabulary ([`Vocabulary`]): Layout of the ids.
        max_length (`int`): Longest document in tokens, or where `overflow="stream"` cuts the stream.
        overflow (`str`): `"drop"` drops retrieved documents from the front until the example fits, and cuts what is
            still too long; `"stream"` keeps everything, for a stream that is cut every `max_length` tokens. Ours.
        span_rate, max_spans, whole_segment: See [`~cm3leon_hf.data.cm3.draw_spans`].
        image_first (`float`): Share of pairs whose image stands in front of the caption.
        instruction (`str`): Stands in front of a caption that is masked whole, as a captioning prompt has it.
        instruction_share (`float`): Share of pairs with the instruction.
        image_noise (`float`): Replaces image tokens that the model reads, not those that it predicts, by random ones:
            of each document a share drawn from [0, `image_noise`]. Ours, for small corpora: exact image tokens name
            the training picture that they come from, so without noise a model learns pictures by heart from their own
            beginnings and hardly looks at the caption.

    Raises:
        ValueError: if `overflow` is unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    max_length: int
    overflow: str = "drop"
    span_rate: float = 1.0
    max_spans: int = 1
    whole_segment: float = 0.0
    image_first: float = 0.0
    instruction: str = "Describe the given picture."
    instruction_share: float = 0.0
    image_noise: float = 0.0

    def __post_init__(self):
        if self.overflow not in ("drop", "stream"):
            raise ValueError(f"expected overflow 'drop' or 'stream', got {self.overflow!r}; choose one")

    def __call__(self, table: pa.Table, rng: np.random.Generator) -> tuple[np.ndarray, Documents]:
        """
        Rows to documents of at most `max_length` tokens with their spans moved; those that do not fit stay unmasked.

        Args:
            table (`pa.Table`): Rows as [`~cm3leon_hf.data.rows.read_rows`] takes them.
            rng (`np.random.Generator`): Source of all draws.

        Returns:
            The ids that the model reads, and the [`Documents`] that it predicts, of the same lengths; a document for
            each row.
        """
        documents, spans = self.documents(table, rng)
        spans = spans.of(moved_lengths(documents, spans) <= self.max_length)
        return self.noisy(move_spans(documents, spans, self.vocabulary).cut(self.max_length), rng)

    def documents(self, table: pa.Table, rng: np.random.Generator) -> tuple[Documents, Spans]:
        """Rows to whole documents, one for each, however long, and the spans that were drawn to be moved."""
        rows = read_rows(table, rng, self.image_first)
        asked = rng.random(len(table)) < self.instruction_share
        source, parts, asked = self._parts(rows, asked & ("texts" not in table.column_names))
        if self.overflow == "drop":
            parts = drop_sections(parts, self.max_length)
        documents = join_parts(source, parts, len(table), self.vocabulary)
        spans = draw_spans(documents, self.vocabulary, rng, self.span_rate, self.max_spans, self.whole_segment)
        stop = documents.offsets[1:][asked.row] - asked.image - 2  # `<break>` and `<eos>`
        answers = Spans(asked.row, stop - asked.answer, stop)
        free = ~np.isin(np.arange(len(table)), asked.row)
        return documents, Spans(*map(np.concatenate, zip(spans.of(free), answers))).ordered()

    def _parts(self, rows: Rows, asked: np.ndarray) -> tuple[np.ndarray, Parts, Asked]:
        """All ids, what documents are made of, and which of the rows `asked` for are captioning examples."""
        texts, images = rows
        captions, pictures = pairs(rows, asked)
        strings = texts.values.to_pylist()
        for index in captions:
            strings[index] = f" {strings[index]}"
        words = self._ids(strings)
        answers = np.array([len(words[index]) for index in captions], np.int64)
        for index in captions:
            words[index] = self._instruction_ids + words[index]
        words = Documents.from_lists(words)
        place = images.place.copy()
        place[pictures] = texts.place.max(initial=0) + 1  # behind the caption, as in the prompt
        sizes = pc.list_value_length(images.values).to_numpy().astype(np.int64)
        parts = Parts(
            np.concatenate([texts.row, images.row]),
            np.concatenate([texts.section, images.section]),
            np.repeat([False, True], [len(texts.row), len(images.row)]),
            np.concatenate([words.offsets[:-1], len(words.ids) + np.cumsum(sizes) - sizes]),
            np.concatenate([words.lengths, sizes]),
        )
        order = np.lexsort((np.concatenate([texts.place, place]), parts.section, parts.document))
        codes = pc.list_flatten(images.values).to_numpy()
        source = np.concatenate([words.ids, codes + self.vocabulary.text_size])
        return source, parts.where(order), Asked(texts.row[captions], answers, sizes[pictures])

    def noisy(self, documents: Documents, rng: np.random.Generator) -> tuple[np.ndarray, Documents]:
        """The ids that the model reads in place of these documents', and the documents."""
        ids = documents.ids
        if self.image_noise:
            share = rng.uniform(0, self.image_noise, len(documents.lengths))
            hit = rng.random(len(ids)) < np.repeat(share, documents.lengths)
            hit &= ids >= self.vocabulary.text_size
            ids = ids.copy()
            ids[hit] = rng.integers(self.vocabulary.text_size, self.vocabulary.size, hit.sum())
        return ids, documents

    @cached_property
    def _instruction_ids(self) -> list[int]:
        return self._ids([self.instruction])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts; what only looks like a special token is text."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def pairs(rows: Rows, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the `wanted` rows that have both, which texts are their captions and which images their pictures."""
    texts, images = rows
    own = max(
        texts.section.max(initial=0), images.section.max(initial=0)
    )  # retrieved documents have the sections below
    both = np.intersect1d(texts.row[texts.section == own], images.row[images.section == own])
    both = both[wanted[both]]
    return tuple(np.flatnonzero((cells.section == own) & np.isin(cells.row, both)) for cells in rows)
