"""Training documents one by one: the data set and the collator of small corpora."""

from collections import defaultdict
from collections.abc import Hashable, Iterable

import datasets
import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .rows import COLUMNS
from .transform import CM3Transform


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
