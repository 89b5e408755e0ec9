"""FAISS indexes for maximum inner product search: which one, how it is trained, filled, and comes from disk."""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from .extra import faiss, merge_ondisk

FLAT = "Flat"
FLAT_BELOW = 1_000_000  # documents; from here on the vectors are compressed
BITS = 328  # of a compressed vector; with RaBitQ's two factors, an id and the centroids' share at most 64 bytes
TRAINING_VECTORS = 40  # for each list of an inverted file; FAISS warns below 39
TRAINING_LEAST = 100_000  # vectors, if there are so many: product codes are trained on them too
SEED = 0  # the vectors an index is trained on are the same in every run
PROBED = 24  # one list of so many is searched
HNSW_FROM = 65536  # lists; from here on a graph finds the nearest of them
LISTS = "index.ivfdata"  # the inverted lists of an index that was merged on disk
PART_VECTORS = 1 << 24  # compressed in memory before they go to disk, for 57 bytes a vector 1.0 GB

if os.name == "posix":  # OpenMP's threads do not survive a fork; a search that waits for them would never end
    os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))


def choose_factory(count: int, dimension: int) -> str:
    """
    FAISS's factory string for a bank of `count` vectors of width `dimension`.

    Flat below a million, and above an inverted file of some `4 sqrt(count)` lists with a bit for each of at most 328
    rotated directions (RaBitQ, Gao and Long 2024), which needs no training beyond that of the lists. No PCA: FAISS's
    takes the mean away, which changes the order of inner products.
    """
    if count < FLAT_BELOW:
        return FLAT
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    graph = "_HNSW32" if lists >= HNSW_FROM else ""
    return f"RR{min(dimension, BITS)},IVF{lists}{graph},RaBitQ"


def trained_index(factory: str, count: int, dimension: int, take: Callable[[np.ndarray], np.ndarray]) -> faiss.Index:
    """
    An index for `count` vectors, trained on a sample and still empty.

    Args:
        factory (`str`): A factory string of FAISS. Of an inverted file, one list of `PROBED` is searched.
        count, dimension (`int`): Number and width of the vectors.
        take (`Callable`): Ascending row numbers to vectors `(rows, dimension)`.

    Raises:
        ValueError: for a factory string that FAISS does not know, or vectors too few or too narrow for it.
    """
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        lists = faiss.try_extract_index_ivf(index)
        if lists is not None:
            lists.nprobe = max(1, lists.nlist // PROBED)
        if not index.is_trained:
            wanted = max(TRAINING_LEAST, TRAINING_VECTORS * (lists.nlist if lists is not None else 0))
            rows = np.random.default_rng(SEED).choice(count, min(count, wanted), replace=False)
            index.train(np.ascontiguousarray(take(np.sort(rows)), np.float32))
    except RuntimeError as error:
        raise ValueError(
            f"expected a factory string for {count} vectors of {dimension}, got {factory!r}: {error}"
        ) from error
    return index


def can_merge_on_disk(index: faiss.Index) -> bool:
    """Whether the index has inverted lists of the kind that [`merge_on_disk`] takes."""
    return type(_lists(index)) is faiss.ArrayInvertedLists


def merge_on_disk(index: faiss.Index, chunks: Iterable[np.ndarray], folder: Path) -> None:
    """
    Fills a trained, empty index whose lists lie in a file of `folder`, so that memory never holds all of them.

    Args:
        index (`faiss.Index`): One that [`can_merge_on_disk`] accepts.
        chunks (`Iterable[np.ndarray]`): All vectors in their order, `(vectors, dimension)` at a time.
        folder (path): Where parts lie until they are merged, and then the lists. The index belongs there too.
    """
    part, parts, start = faiss.clone_index(index), [], 0
    for chunk in chunks:
        part.add_with_ids(chunk, np.arange(start, start + len(chunk)))
        start += len(chunk)
        if part.ntotal >= PART_VECTORS:
            parts.append(_write_part(part, folder / f"part-{len(parts)}.faiss"))
    if part.ntotal:
        parts.append(_write_part(part, folder / f"part-{len(parts)}.faiss"))
    merge_ondisk(index, [str(path) for path in parts], str(folder / LISTS))
    for path in parts:
        path.unlink()


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index with everything that [`read_index`] needs: lists that lie on disk go beside it."""
    lists = _lists(index)
    if isinstance(lists, faiss.OnDiskInvertedLists) and Path(lists.filename) != path.parent / LISTS:
        shutil.copyfile(lists.filename, path.parent / LISTS)
    faiss.write_index(index, str(path))


def read_index(path: Path, mapped: bool) -> faiss.Index:
    """
    Reads an index, or maps it: a mapped one is there at once, whatever its size, and takes no vectors.

    Raises:
        ValueError: if the file is no index, or is damaged.
    """
    flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    if (path.parent / LISTS).exists():  # FAISS maps these itself, and looks for them where they were written
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    try:
        index = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ValueError(f"expected an index of FAISS in {path}, could not read it: {error}; copy it again") from error
    lists = _lists(index)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        lists.prefetch_nthread = 0  # threads that a forked worker would wait for
        if not mapped:
            _into_memory(index, lists)
    return index


def _lists(index: faiss.Index) -> "faiss.InvertedLists | None":
    inverted = faiss.try_extract_index_ivf(index)
    return None if inverted is None else faiss.downcast_InvertedLists(inverted.invlists)


def _write_part(part: faiss.Index, path: Path) -> Path:
    """Writes vectors with their row numbers, and empties the index for the next."""
    faiss.write_index(part, str(path))
    part.reset()
    return path


def _into_memory(index: faiss.Index, lists: faiss.OnDiskInvertedLists) -> None:
    copy = faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
    lists.copy_subset_to(copy, faiss.InvertedLists.SUBSET_TYPE_ID_RANGE, 0, index.ntotal)
    faiss.try_extract_index_ivf(index).replace_invlists(copy, True)
    copy.this.disown()


def checked_vectors(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """
    Vectors as FAISS takes them: float32, contiguous.

    Raises:
        ValueError: for another shape than `(vectors, dimension)`, for NaN, and for infinity.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ValueError(f"expected vectors of shape (n, {dimension}), got {vectors.shape}; use the bank's encoder")
    if not np.isfinite(vectors).all():
        row = int((~np.isfinite(vectors)).any(1).argmax())
        raise ValueError(f"expected finite vectors, got NaN or infinity in row {row}; check the encoder's input")
    return vectors


__all__ = [
    "can_merge_on_disk",
    "checked_vectors",
    "choose_factory",
    "merge_on_disk",
    "read_index",
    "trained_index",
    "write_index",
]
