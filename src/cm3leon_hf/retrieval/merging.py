"""One index over the vectors of several banks."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .documents import check_ids
from .indexes import can_merge_on_disk, trained_index

if TYPE_CHECKING:
    from .extra import faiss
    from .memory_bank import MemoryBank

CHUNK = 65536  # vectors held in memory at a time


def check_alike(banks: list["MemoryBank"]) -> None:
    """
    Raises:
        ValueError: if there is no document, encoders or dimensions differ, or an id occurs twice.
    """
    if not sum(len(bank) for bank in banks):
        raise ValueError("expected banks with documents, got none; check the source")
    kinds = {(bank.encoder, bank.dimension) for bank in banks}
    if len(kinds) > 1:
        raise ValueError(f"expected banks of one encoder and dimension, got {sorted(kinds)}; build them alike")
    check_ids([bank.ids for bank in banks])


def merged_index(
    banks: list["MemoryBank"], factory: str, shape: tuple[int, int]
) -> tuple["faiss.Index", Iterator[np.ndarray] | None]:
    """
    An index for the vectors of several banks, trained on a sample of them.

    Args:
        banks (`list[MemoryBank]`): Banks of one encoder.
        factory (`str`): A factory string of FAISS.
        shape (`tuple[int, int]`): Number and width of all vectors.

    Returns:
        The index, and what is still to be merged into it on disk: `None` if it is filled.
    """
    index = trained_index(factory, *shape, partial(_vectors_at, banks))
    if can_merge_on_disk(index):
        return index, chunks(banks)
    for chunk in chunks(banks):
        index.add(chunk)
    return index, None


def chunks(banks: list["MemoryBank"]) -> Iterator[np.ndarray]:
    """All vectors in their order, `(at most CHUNK, dimension)` at a time."""
    for bank in banks:
        for start in range(0, len(bank), CHUNK):
            yield bank.vectors(np.arange(start, min(start + CHUNK, len(bank))))


def _vectors_at(banks: list["MemoryBank"], rows: np.ndarray) -> np.ndarray:
    """The vectors of ascending `rows`, counted through all banks."""
    stops = np.cumsum([len(bank) for bank in banks])
    parts = np.split(rows, np.searchsorted(rows, stops[:-1]))
    return np.concatenate([bank.vectors(part - stop + len(bank)) for bank, part, stop in zip(banks, parts, stops)])


__all__ = ["check_alike", "chunks", "merged_index"]
