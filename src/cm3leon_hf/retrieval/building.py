"""Encoding a source of rows shard by shard, so that a stopped build goes on where it was."""

import json
import os
from collections.abc import Iterator
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .bank_files import MANIFEST
from .documents import encode_rows
from .extra import Dataset, Image, IterableDataset
from .memory_bank import MemoryBank

if TYPE_CHECKING:
    from .encoder import CLIPEncoder

PLAN, SHARD, SHARDS = "plan.json", "shard-{:06d}", "shard-*"


def write_shards(
    source: Dataset | IterableDataset,
    encoder: "CLIPEncoder",
    folder: str | PathLike,
    shard_size: int = 50_000,
    process: int = 0,
    processes: int = 1,
) -> None:
    """
    Encodes a source's rows into shards, each a bank of its own; those that are there are left as they are.

    A bar shows how many rows are encoded, of how many if the source knows, and how many a second.

    Args:
        source, encoder, shard_size: See [`~cm3leon_hf.retrieval.memory_bank.MemoryBank.build`].
        folder (path): Of the shards; one that all processes see.
        process, processes (`int`): Of `processes` processes, this one makes every shard whose number leaves
            `process` as a rest.

    Raises:
        ValueError: for rows that cannot be documents, for an id twice in a shard, and if the shards that are there were
            made of another number of rows, by another encoder or in another size. Other rows of the same number go
            unnoticed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(source) if isinstance(source, Dataset) else None
    _check_plan(folder / PLAN, {"encoder": encoder.name, "shard_size": shard_size, "rows": rows})
    with tqdm(
        total=_rows_left(rows, shard_size, folder, process, processes), desc="encoding", unit=" rows", unit_scale=True
    ) as bar:
        for number, window in _windows(undecoded(source), shard_size, process, processes):
            if not _is_there(folder, number):
                documents, vectors, skipped = encode_rows(_counted(window, bar), encoder)
                bank = MemoryBank.from_vectors(documents, vectors, encoder.name, skipped=skipped)
                bank.save(folder / SHARD.format(number))


def _rows_left(rows: int | None, size: int, folder: Path, process: int, processes: int) -> int | None:
    """Rows of this process's missing shards; unknown for a stream."""
    if rows is None:
        return None
    missing = (at for at in range(process, -(-rows // size), processes) if not _is_there(folder, at))
    return sum(min(size, rows - at * size) for at in missing)


def _is_there(folder: Path, number: int) -> bool:
    return (folder / SHARD.format(number) / MANIFEST).exists()


def _counted(rows: Iterator[dict], bar: tqdm) -> Iterator[dict]:
    for row in rows:
        yield row
        bar.update()


def undecoded(source, column: str = "image"):
    """The source with pictures as their files' bytes, so that a broken one stops nothing before it is read."""
    is_decoded = isinstance((source.features or {}).get(column), Image)
    return source.cast_column(column, Image(decode=False)) if is_decoded else source


def _windows(source, size: int, process: int, processes: int) -> Iterator[tuple[int, Iterator[dict]]]:
    """Numbers and rows of one process's shards. A data set is read where a shard lies, a stream from its beginning."""
    if isinstance(source, Dataset):
        for number in range(process, -(-len(source) // size), processes):
            yield number, iter(source.select(range(number * size, min((number + 1) * size, len(source)))))
        return
    rows = iter(source)
    for number in count():
        window = list(islice(rows, size))
        if not window:
            return
        if number % processes == process:
            yield number, iter(window)


def _check_plan(path: Path, plan: dict) -> None:
    """Refuses shards that would not fit together."""
    if path.exists():
        there = json.loads(path.read_text("utf-8"))
        if there != plan:
            raise ValueError(f"expected shards of {plan} in {path.parent}, got {there}; remove them or build as before")
        return
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(plan), "utf-8")
    part.replace(path)


__all__ = ["undecoded", "write_shards"]
