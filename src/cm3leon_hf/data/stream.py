"""The training stream: packed sequences without end, whose state is small and exact."""

import copy
import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .packing import pack
from .rows import usable
from .sources import Rows, windows
from .transform import CM3Transform

logger = logging.getLogger(__name__)


class PackedStream(IterableDataset):
    """
    Packed CM3 sequences of a source, epoch after epoch.

    Rows are read in windows; all draws of a window depend on the seed, the epoch, the reader and the window's number.
    So the state is only where the window begins in the source and how many of its sequences were taken, and a run
    that goes on from it gets the sequences of an unbroken one, to the last token. For torchdata's
    `StatefulDataLoader`, with any number of workers.

    Args:
        rows (`datasets.Dataset`, `datasets.IterableDataset` or [`Mixture`]): See [`~cm3leon_hf.data.rows.read_rows`].
        transform ([`CM3Transform`]): What makes the documents.
        window (`int`): Rows that are shuffled and packed together. More of them pad less.
        seed (`int`): Fixes all draws.
        apart (`bool`): Whether documents of one sequence do not see each other.
        rank, world_size (`int`): Which process this is, of how many; each reads its own rows.
    """

    def __init__(
        self,
        rows: Rows,
        transform: CM3Transform,
        window: int = 1024,
        seed: int = 0,
        apart: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows, self.transform, self.window, self.seed, self.apart = rows, transform, window, seed, apart
        self.rank, self.world_size = rank, world_size
        self.state = {"epoch": 0, "window": 0, "source": None, "taken": 0, "skipped_rows": 0}

    def state_dict(self) -> dict:
        """Where the next sequence comes from, and how many broken rows were skipped so far."""
        return copy.deepcopy(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = copy.deepcopy(state)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        shard, shards = self.rank * workers + index, self.world_size * workers
        while True:
            state = self.state
            for table, after in windows(
                self.rows, self.window, self.seed, state["epoch"], shard, shards, state["source"]
            ):
                yield from self._window(table, shard)
                state = self.state
                self.state = state | {"window": state["window"] + 1, "source": after, "taken": 0}
            if self.state["window"] == 0:
                raise ValueError(
                    f"expected rows for each of {shards} readers, got none for reader {shard}; use fewer workers"
                )
            self.state = self.state | {"epoch": self.state["epoch"] + 1, "window": 0, "source": None}

    def _window(self, table: pa.Table, shard: int) -> Iterator[dict[str, np.ndarray]]:
        begin = self.state
        kept = self._whole(table)
        rng = np.random.default_rng((self.seed, begin["epoch"], shard, begin["window"]))
        sequences = pack(self.transform, kept, rng, self.apart)
        skipped = begin["skipped_rows"] + (len(table) - len(kept) if not begin["taken"] else 0)
        for number in range(begin["taken"], len(sequences.input_ids)):
            self.state = begin | {"taken": number + 1, "skipped_rows": skipped}
            yield {name: values[number] for name, values in sequences._asdict().items() if values is not None}

    def _whole(self, table: pa.Table) -> pa.Table:
        kept = usable(table, self.transform.vocabulary)
        if not kept.all():
            logger.warning("skipped %d of %d rows: no text or image, or broken codes", (~kept).sum(), len(kept))
        return table.filter(pa.array(kept))


def stack(examples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Sequences to a batch of tensors `(batch, length)`."""
    return {name: torch.from_numpy(np.stack([each[name] for each in examples])) for name in examples[0]}
