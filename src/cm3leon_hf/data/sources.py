"""Sources of rows: local files, webdataset tars and the hub, read in windows that a stopped run finds again."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node

from .rows import COLUMNS

Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class Source:
    """
    One source of rows.

    Args:
        path (`str`): A folder, a name on the hub, or the format of `files`: `"parquet"`, `"arrow"` or `"webdataset"`.
        files (`str` or `list[str]`, *optional*): Patterns or addresses of files, such as `"shards/*.tar"`.
        name (`str`, *optional*): Configuration of a data set that has several.
        split (`str`): Split to read.
        streaming (`bool`): Whether to read while training goes on, in the order of the files, each window of rows
            shuffled; otherwise all rows are on disk, and shuffled in each epoch.
        weight (`float`): Share of the rows of a mixture, relative to the other sources.
        columns (`dict[str, str]`): Columns to rename, such as `{"txt": "captions"}`.
    """

    path: str
    files: str | list[str] | None = None
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)

    def open(self) -> Rows:
        """
        The source's rows with the columns of [`~cm3leon_hf.data.rows.read_rows`].

        Raises:
            ValueError: if it has none of them.
        """
        rows = load_dataset(self.path, self.name, data_files=self.files, split=self.split, streaming=self.streaming)
        if self.columns:  # only then: renaming a stream reads it row by row
            rows = rows.rename_columns(self.columns)
        wanted = [column for column in COLUMNS if column in rows.column_names]
        if not wanted:
            raise ValueError(
                f"expected {self.path} to have a column among {COLUMNS}, got {rows.column_names}; name them in "
                "`columns`, or encode its images with recipes/data/tokenize_images.py"
            )
        return rows.select_columns(wanted)


def open_sources(sources: list[Source], seed: int) -> Rows:
    """The rows of one source, or a mixture by weight that ends when each source was read once."""
    opened = [source.open() for source in sources]
    if len(opened) == 1:
        return opened[0]
    if any(source.streaming for source in sources):
        opened = [rows if isinstance(rows, IterableDataset) else rows.to_iterable_dataset() for rows in opened]
    weights = np.array([source.weight for source in sources])
    return interleave_datasets(opened, list(weights / weights.sum()), seed=seed, stopping_strategy="all_exhausted")


def windows(
    rows: Rows, size: int, seed: int, epoch: int, shard: int, shards: int, state: dict | None
) -> Iterator[tuple[pa.Table, dict]]:
    """
    One epoch's rows of one reader, a window at a time.

    Rows on disk are shuffled anew in each epoch; streams keep their order.

    Args:
        rows (`Dataset` or `IterableDataset`): What to read.
        size (`int`): Rows of a window.
        seed, epoch (`int`): Fix the order.
        shard, shards (`int`): Which of how many readers this is; each row has one reader. A stream of files is read
            fastest if their number is a multiple of the readers'.
        state (`dict`, *optional*): Where to go on; from the beginning without it.

    Yields:
        A `pa.Table` of at most `size` rows, and the state behind it.
    """
    if isinstance(rows, IterableDataset):
        part = split_dataset_by_node(rows, shard, shards).with_format("arrow")
        part.set_epoch(epoch)
        if state is not None:
            part.load_state_dict(state)
        for table in part.iter(size):
            yield table, part.state_dict()
        return
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))[shard::shards]
    rows = rows.with_format("arrow")
    for start in range(state["row"] if state else 0, len(order), size):
        yield rows[order[start : start + size]], {"row": start + size}
