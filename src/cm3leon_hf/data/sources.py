"""Sources of rows: local files, webdataset tars and the hub, read in windows that a stopped run finds again."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node

from .rows import COLUMNS


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

    def open(self) -> Dataset | IterableDataset:
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


@dataclass(frozen=True)
class Mixture:
    """Several sources, of which each window holds rows by their weights; none ends before another."""

    rows: list[Dataset | IterableDataset]
    weights: list[float]

    def shares(self, size: int) -> list[int]:
        """How many of a window's rows each source gives, at least one."""
        weights = np.array(self.weights)
        return np.maximum(np.rint(weights / weights.sum() * size), 1).astype(int).tolist()


Rows = Dataset | IterableDataset | Mixture


def open_sources(sources: list[Source]) -> Rows:
    """The rows of one source, or a mixture by weight."""
    if len(sources) == 1:
        return sources[0].open()
    return Mixture([source.open() for source in sources], [source.weight for source in sources])


def windows(
    rows: Rows, size: int, seed: int, epoch: int, shard: int, shards: int, state=None
) -> Iterator[tuple[pa.Table, object]]:
    """
    One epoch's rows of one reader, a window at a time; a mixture's epoch never ends.

    Rows on disk are shuffled anew in each epoch; streams keep their order.

    Args:
        rows (`Dataset`, `IterableDataset` or [`Mixture`]): What to read.
        size (`int`): Rows of a window.
        seed, epoch (`int`): Fix the order.
        shard, shards (`int`): Which of how many readers this is; each row has one reader. A stream of files is read
            fastest if their number is a multiple of the readers'.
        state (*optional*): Where to go on; from the beginning without it.

    Yields:
        A `pa.Table` of at most `size` rows, and the state behind it, which JSON can hold.

    Raises:
        ValueError: if the epoch of a mixture's source has no row for this reader.
    """
    if isinstance(rows, Mixture):
        readers = [
            _endless(part, share, seed + index, shard, shards, state and state[index])
            for index, (part, share) in enumerate(zip(rows.rows, rows.shares(size)))
        ]
        for read in zip(*readers):
            tables = [_with_wordings(table) for table, _ in read]
            yield pa.concat_tables(tables, promote_options="permissive"), [after for _, after in read]
    elif isinstance(rows, IterableDataset):
        part = split_dataset_by_node(rows, shard, shards).with_format("arrow")
        part.set_epoch(epoch)
        if state is not None:
            part.load_state_dict(state)
        for table in part.iter(size):
            yield table, part.state_dict()
    else:
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))[shard::shards]
        rows = rows.with_format("arrow")
        for start in range(state or 0, len(order), size):
            yield rows[order[start : start + size]], start + size


def _endless(rows: Dataset | IterableDataset, size: int, seed: int, shard: int, shards: int, state) -> Iterator:
    epoch, source = state or (0, None)
    while True:
        table = None
        for table, after in windows(rows, size, seed, epoch, shard, shards, source):
            yield table, (epoch, after)
        if table is None and source is None:
            raise ValueError(
                f"expected rows for each of {shards} readers, got none for reader {shard}; use fewer workers"
            )
        epoch, source = epoch + 1, None


def _with_wordings(table: pa.Table) -> pa.Table:
    """Captions as lists of wordings, as some of a mixture's sources may have them."""
    index = table.schema.get_field_index("captions")
    if index < 0 or pa.types.is_list(table.schema.types[index]):
        return table
    captions = table["captions"].cast(pa.string()).combine_chunks()
    return table.set_column(index, "captions", pa.ListArray.from_arrays(np.arange(len(captions) + 1), captions))
