"""FAISS indexes for maximum inner product search: which one, how it is trained, and how it comes from disk."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .extra import faiss

FLAT = "Flat"
FLAT_BELOW = 1_000_000  # documents; from here on the vectors are compressed
CODE_BYTES = 64  # of a compressed vector, or fewer where the dimension does not divide
TRAINING_VECTORS = 40  # for each list of an inverted file; FAISS warns below 39
TRAINING_LEAST = 100_000  # vectors, if there are so many: the rotation and the product codes are trained on them too
SEED = 0  # the vectors an index is trained on are the same in every run
PROBED = 64  # one list of so many is searched
HNSW_FROM = 65536  # lists; from here on a graph finds the nearest of them

if os.name == "posix":  # OpenMP's threads do not survive a fork; a search that waits for them would never end
    os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))


def choose_factory(count: int, dimension: int) -> str:
    """
    FAISS's factory string for a bank of `count` vectors of width `dimension`.

    Flat below a million, and above an inverted file of some `4 sqrt(count)` lists with product codes of 64 bytes.
    """
    if count < FLAT_BELOW:
        return FLAT
    lists, size = 2 ** round(math.log2(4 * math.sqrt(count))), math.gcd(dimension, CODE_BYTES)
    graph = "_HNSW32" if lists >= HNSW_FROM else ""
    return f"OPQ{size},IVF{lists}{graph},PQ{size}"


def trained_index(factory: str, count: int, dimension: int, take: Callable[[np.ndarray], np.ndarray]) -> faiss.Index:
    """
    An index for `count` vectors, trained on a sample and still empty.

    Args:
        factory (`str`): A factory string of FAISS. Of an inverted file, one list of 64 is searched.
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


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index with everything that [`read_index`] needs."""
    faiss.write_index(index, str(path))


def read_index(path: Path, mapped: bool) -> faiss.Index:
    """
    Reads an index, or maps it: a mapped one is there at once, whatever its size, and takes no vectors.

    Raises:
        ValueError: if the file is no index, or is damaged.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise ValueError(f"expected an index of FAISS in {path}, could not read it: {error}; copy it again") from error


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


__all__ = ["choose_factory", "read_index", "trained_index", "write_index"]
