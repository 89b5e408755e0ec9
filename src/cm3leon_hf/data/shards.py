"""Data sets that are rewritten as Parquet files, which processes share and a stopped run goes on with."""

import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import IterableDataset, load_dataset


class Shard(NamedTuple):
    """A part of a split that becomes a file."""

    split: str
    index: int
    rows: IterableDataset
    path: Path


def environment(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


@dataclass
class ShardArguments:
    """
    Flags of a script that rewrites a data set with pictures, for `TrlParser`.

    Raises:
        ValueError: if the rank is not one of `world_size`.
    """

    dataset: str = field(metadata={"help": "Folder, hub name, or format of `files`: parquet, webdataset, imagefolder."})
    _: KW_ONLY
    files: str | None = field(default=None, metadata={"help": "Pattern of files, such as shards/*.tar."})
    streaming: bool = field(default=False, metadata={"help": "Read without downloading; a file a source's file."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the pictures."})
    num_shards: int = field(default=1, metadata={"help": "Files for each split that is not streamed."})
    rank: int = field(
        default_factory=lambda: environment("RANK", "SLURM_PROCID", default=0),
        metadata={"help": "Number of this process; torchrun and Slurm set it."},
    )
    world_size: int = field(
        default_factory=lambda: environment("WORLD_SIZE", "SLURM_NTASKS", default=1),
        metadata={"help": "Number of processes; torchrun and Slurm set it."},
    )

    def __post_init__(self):
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"expected a rank from 0 to {self.world_size - 1}, got {self.rank}; count from 0")

    @property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU."""
        kind = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(kind.type, self.rank % torch.accelerator.device_count()) if kind else torch.device("cpu")

    def splits(self) -> dict:
        """The data set's splits, streamed if asked for."""
        return load_dataset(self.dataset, data_files=self.files, streaming=self.streaming)

    def missing_shards(self, folder: Path, again: str) -> Iterator[Shard]:
        """
        The shards that this process, one of `world_size`, is to write and whose files are not there yet.

        Args:
            folder (`Path`): Where the files go; made if it is not there.
            again (`str`): What to remove a file for, printed for each that is there already.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in self.splits().items():
            parts = in_shards(rows, self.num_shards)
            for index in range(self.rank, len(parts), self.world_size):
                path = folder / f"{split}-{index:05d}-of-{len(parts):05d}.parquet"
                if path.exists():
                    print(f"{split}: {path} is there; remove it {again}")
                else:
                    yield Shard(split, index, parts[index], path)


def in_shards(split, num_shards: int) -> list[IterableDataset]:
    """The parts of a split that become a file each: the given number, or the files of a stream."""
    if isinstance(split, IterableDataset):
        return [split.shard(split.num_shards, index) for index in range(split.num_shards)]
    return [split.shard(num_shards, index).to_iterable_dataset() for index in range(num_shards)]


def write_parquet(rows: IterableDataset, path: Path) -> None:
    """Writes a file as a whole or, if the process dies, not at all."""
    rows.to_parquet(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


__all__ = ["Shard", "ShardArguments", "in_shards", "write_parquet"]
