"""Training documents one by one: the data set and the collator of small corpora."""

import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable

import datasets
import numpy as np
import pyarrow as pa
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .rows import COLUMNS, usable
from .transform import CM3Transform

logger = logging.getLogger(__name__)


class CM3Rows(torch.utils.data.Dataset):
    """
    One training document for each row.

    What a row becomes depends on the seed, the epoch and the row's number alone: not on the order, the batch or the
    worker that it is read in, so that a run which goes on from a checkpoint sees what an unbroken one sees.

    Args:
        rows (`datasets.Dataset`): See [`~cm3leon_hf.data.rows.read_rows`]; other columns are ignored.
        transform ([`CM3Transform`]): What makes the documents.
        seed (`int`): Fixes all draws.
    """

    def __init__(self, rows: datasets.Dataset, transform: CM3Transform, seed: int):
        wanted = [name for name in COLUMNS if name in rows.column_names]
        self.rows, self.transform = rows.select_columns(wanted).with_format("arrow"), transform
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` of shape `(length,)`."""
        read, documents = self.transform(self.rows[index], np.random.default_rng((self.seed, self.epoch, index)))
        return {"input_ids": read, "labels": documents.ids}


def fitting_rows(rows: datasets.Dataset, transform: CM3Transform) -> datasets.Dataset:
    """
    The rows whose documents are whole; the number of others is logged.

    Args:
        rows (`datasets.Dataset`): See [`~cm3leon_hf.data.rows.read_rows`].
        transform ([`CM3Transform`]): Says how long a document may be.

    Raises:
        ValueError: if no column is known, or no row is left.
    """
    if not set(rows.column_names) & {"texts", "captions", "codes"}:
        raise ValueError(f"expected columns among {COLUMNS}, got {rows.column_names}; rename them")
    kept = [np.zeros(0, bool)]
    for table in rows.with_format("arrow").iter(1000):
        fits = usable(table, transform.vocabulary)
        documents, _ = transform.documents(table.filter(pa.array(fits)), np.random.default_rng(0))
        fits[fits] = documents.lengths <= transform.max_length
        kept.append(fits)
    kept = np.concatenate(kept)
    if not kept.any():
        raise ValueError(
            f"expected rows to train on, got {len(rows)}, none of them with whole codes, an answer, and at most "
            f"{transform.max_length} tokens; look at how they were built"
        )
    if not kept.all():
        logger.warning(
            "skipped %d of %d rows: broken codes, an empty answer, or more than %d tokens",
            (~kept).sum(),
            len(kept),
            transform.max_length,
        )
    return rows.select(np.flatnonzero(kept))


def balanced_rows(groups: Iterable[Hashable], passes: int) -> list[int]:
    """
    Row numbers in which every group stands equally often, however many rows it has.

    Args:
        groups (`Iterable[Hashable]`): The group of each row, such as its (concept, style).
        passes (`int`): How often a group stands there; its rows take turns.

    Returns:
        `list[int]` of length `number of groups * passes`, for `datasets.Dataset.select`.
    """
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    return [rows[turn % len(rows)] for turn in range(passes) for rows in members.values()]


class CausalCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator without its attention mask.

    Padding is on the right, where no token of a causal model looks, and its labels are -100. Without a mask,
    attention takes its causal fast path.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        return {name: batch[name] for name in ("input_ids", "labels")}
