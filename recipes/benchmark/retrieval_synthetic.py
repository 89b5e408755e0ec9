"""Synthetic documents, queries and an encoder for the benchmark of retrieval."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from cm3leon_hf.retrieval.documents import FEATURES
from cm3leon_hf.retrieval.memory_bank import MemoryBank

ENCODER = "synthetic"
SHARD = 50_000
SPREAD = 0.8  # about a cluster's centre; see write_vectors
TEXT, PICTURE = 0, 1


def write_vectors(folder: Path, count: int, dimension: int, queries: int) -> None:
    """
    Writes documents' vectors and queries, texts and pictures by turns, as `.npy`.

    They are as a CLIP makes them: texts and pictures lie about means of their own, and a document is the mean of its
    text's unit vector and its picture's. Documents gather in clusters whose sizes follow a power law, as do the
    variances of the directions. Cosines are some 0.76 between pictures of one cluster, and between texts, 0.38 between
    a text and its picture and between clusters, and 0.82 between documents of one cluster.
    """
    rng = np.random.default_rng(0)
    deviations = (np.arange(1, dimension + 1) ** -0.5).astype(np.float32)
    deviations /= np.linalg.norm(deviations)
    rotation = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0].astype(np.float32)
    clusters = max(count // 250, 1)
    means = rng.standard_normal((2, dimension), np.float32) * deviations
    centres = rng.standard_normal((clusters, dimension), np.float32) * deviations
    shares = 1 / np.arange(1, clusters + 1)

    def draw(kind: int, cluster: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal((len(cluster), dimension), np.float32) * deviations
        vectors = (means[kind] + centres[cluster] + SPREAD * noise) @ rotation
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def draw_clusters(count: int) -> np.ndarray:
        return rng.choice(clusters, count, p=shares / shares.sum())

    (folder / "vectors").mkdir()
    vectors = np.lib.format.open_memmap(folder / "vectors" / "vectors.npy", "w+", np.float32, (count, dimension))
    for start in range(0, count, SHARD):
        cluster = draw_clusters(len(vectors[start : start + SHARD]))
        vectors[start : start + SHARD] = (draw(TEXT, cluster) + draw(PICTURE, cluster)) / 2
    vectors.flush()
    cluster = draw_clusters(-(-queries // 2))
    asked = np.stack([draw(TEXT, cluster), draw(PICTURE, cluster)], axis=1)
    np.save(folder / "queries.npy", asked.reshape(-1, dimension)[:queries])


def documents(start: int, stop: int) -> Dataset:
    """Documents with a text and the codes of an 8×8 picture."""
    rng, count = np.random.default_rng(start), stop - start
    names = [str(row) for row in range(start, stop)]
    codes = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(8192, size=64 * count, dtype=np.uint16)), 64)
    columns = {"id": names, "text": [f"document {name}" for name in names], "codes": codes.cast(pa.list_(pa.uint16()))}
    columns |= {"image": pa.nulls(count, pa.string()), "licence": ["CC0-1.0"] * count}
    columns["content"] = rng.integers(2**63, size=count, dtype=np.uint64)
    return Dataset(pa.table(columns, FEATURES.arrow_schema))


def write_shards(folder: Path) -> None:
    """Writes the documents with their vectors as banks of some each."""
    vectors = np.load(folder / "vectors" / "vectors.npy", mmap_mode="r")
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        part = vectors[start : start + SHARD]
        bank = MemoryBank.from_vectors(documents(start, start + len(part)), part, ENCODER)
        bank.save(folder / "shards" / f"{number:05d}")
