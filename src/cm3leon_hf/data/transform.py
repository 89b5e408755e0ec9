"""The CM3 transform: rows of a table to training documents."""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ..vocabulary import Vocabulary
from .cm3 import Spans, draw_spans, move_spans, moved_lengths
from .documents import IGNORED, Documents, Parts, drop_sections, ends_to_offsets, join_parts
from .rows import Rows, instructed, read_rows


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
        answer_share (`float`): Share of the rows of tasks whose output stands at the end, as prompts have it: a text
            in front of its image is moved there, and what stands there already is all that is left to say. The others
            have random spans, of which those that hide an instruction train guidance. Ours; the paper says only
            that the objective is the same over instruction and output.
        completion_only_loss (`bool`): Whether of the rows of tasks only the output and the `<eos>` that closes it are
            predicted. Best with `answer_share=1.0`: where it is lower, text is predicted without its image too.
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
    answer_share: float = 0.0
    completion_only_loss: bool = False
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
            each row. -100 stands for what is not to be predicted.
        """
        documents, spans = self.documents(table, rng)
        spans = spans.of(moved_lengths(documents, spans) <= self.max_length)
        return self.examples(move_spans(documents, spans, self.vocabulary).cut(self.max_length), rng)

    def documents(self, table: pa.Table, rng: np.random.Generator) -> tuple[Documents, Spans]:
        """
        Rows to whole documents, one for each, however long, and the spans that were drawn to be moved.

        The ids of outputs are inverted (`~id`, which is negative), so that [`~CM3Transform.examples`] finds them.
        """
        rows = read_rows(table, rng, self.image_first)
        asked = rng.random(len(table)) < np.where(rows.answer < 0, self.instruction_share, self.answer_share)
        of_tasks = "texts" in table.column_names
        source, parts = self._parts(rows if of_tasks else instructed(rows, asked, self.instruction), of_tasks)
        if self.overflow == "drop":
            parts = drop_sections(parts, self.max_length)
        documents = join_parts(source, parts, len(table), self.vocabulary)
        spans = draw_spans(documents, self.vocabulary, rng, self.span_rate, self.max_spans, self.whole_segment)
        answers = outputs(documents).of(asked)
        free = ~np.isin(np.arange(len(table)), answers.document)
        inner = answers.stop < documents.offsets[1:][answers.document] - 1  # in front of `<eos>` nothing is to move
        return documents, Spans(*(np.concatenate([a, b[inner]]) for a, b in zip(spans.of(free), answers))).ordered()

    def examples(self, documents: Documents, rng: np.random.Generator) -> tuple[np.ndarray, Documents]:
        """
        The ids that the model reads, some image tokens of them noise, and the documents that it predicts.

        Args:
            documents ([`Documents`]): As [`~CM3Transform.documents`] gives them, their spans moved.
            rng (`np.random.Generator`): Source of all draws.
        """
        output = documents.ids < 0
        documents = documents._replace(ids=np.where(output, ~documents.ids, documents.ids))
        read = self._noisy(documents, rng)
        if self.completion_only_loss and output.any():
            documents = documents._replace(ids=np.where(self._counted(documents, output), documents.ids, IGNORED))
        return read, documents

    def _parts(self, rows: Rows, of_tasks: bool) -> tuple[np.ndarray, Parts]:
        """All ids, those of outputs inverted, and what documents are made of."""
        texts, images, own, answer = rows
        located = of_tasks & (answer[texts.row] >= 0) & (texts.section == own)
        words = self._ids(texts.values.to_pylist(), located.tolist())
        codes = pc.list_flatten(images.values).to_numpy()
        sizes = pc.list_value_length(images.values).to_numpy().astype(np.int64)
        lengths = np.concatenate([words.lengths, sizes])
        source = np.concatenate([words.ids, codes + self.vocabulary.text_size])
        source = np.where(np.repeat(np.concatenate(rows.answers()), lengths), ~source, source)
        row, section, place = (np.concatenate(columns) for columns in zip(texts[1:], images[1:]))
        is_image = np.repeat([False, True], [len(texts.row), len(images.row)])
        order = np.lexsort((place, section, row))
        return source, Parts(row, section, is_image, np.cumsum(lengths) - lengths, lengths).where(order)

    def _noisy(self, documents: Documents, rng: np.random.Generator) -> np.ndarray:
        """The documents' ids with `image_noise`."""
        ids = documents.ids
        if self.image_noise:
            share = rng.uniform(0, self.image_noise, len(documents.lengths))
            hit = rng.random(len(ids)) < np.repeat(share, documents.lengths)
            hit &= ids >= self.vocabulary.text_size
            ids = ids.copy()
            ids[hit] = rng.integers(self.vocabulary.text_size, self.vocabulary.size, hit.sum())
        return ids

    def _counted(self, documents: Documents, output: np.ndarray) -> np.ndarray:
        """Which ids `completion_only_loss` counts: outputs with the `<eos>` behind them, and documents without one."""
        document = np.repeat(np.arange(len(documents.lengths)), documents.lengths)
        plain = np.bincount(document[output], minlength=len(documents.lengths)) == 0
        behind = np.append(False, output[:-1] & (document[1:] == document[:-1]))
        return output | (behind & (documents.ids == self.vocabulary.eos_id)) | plain[document]

    @cached_property
    def _location(self) -> re.Pattern:
        return re.compile(f"({'|'.join(self.vocabulary.location_ids)})")

    def _ids(self, texts: list[str], located: list[bool]) -> Documents:
        """Ids of texts; what looks like a special token is text, but for box coordinates in the `located` ones."""
        pieces = [self._location.split(text) if boxes else [text] for text, boxes in zip(texts, located)]
        words = [word for row in pieces for word in row[::2]]
        words = self.tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"] if words else []
        words, locations = iter(words), self.vocabulary.location_ids
        lists = [[locations[one]] if index % 2 else next(words) for row in pieces for index, one in enumerate(row)]
        laid = Documents.from_lists(lists)
        return laid._replace(offsets=laid.offsets[ends_to_offsets([len(row) for row in pieces])])


def outputs(documents: Documents) -> Spans:
    """The outputs of documents, which have inverted ids."""
    edges = np.diff(documents.ids < 0, prepend=False, append=False)
    start, stop = np.flatnonzero(edges).reshape(-1, 2).T
    return Spans(np.searchsorted(documents.offsets, start, side="right") - 1, start, stop)
