"""The memory bank: documents on disk, and an index that finds those with the largest inner product."""

import json
from collections.abc import Iterable
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bank_files import (
    INDEX,
    MANIFEST,
    SKIPPED,
    VECTORS,
    check_facts,
    check_files,
    checksum,
    read_documents,
    read_manifest,
    read_vectors,
    remove_folder,
    write_bank,
)
from .documents import PUBLIC, check_ids, matched_documents
from .extra import Dataset, IterableDataset, concatenate_datasets, pa, pc
from .indexes import FLAT, checked_vectors, choose_factory, read_index, trained_index
from .merging import check_alike, chunks, merged_index

if TYPE_CHECKING:
    from .encoder import CLIPEncoder  # brings torch, which a search can do without

REFINE = 32  # a compressed index proposes so many times k documents, and their exact vectors decide
MAX_SCORE = 0.9


class MemoryBank:
    """
    Documents and a FAISS index of their vectors.

    Make one with [`build`], [`from_vectors`], [`load`] or [`merge`]. A saved or loaded bank pickles as its folder, so
    that workers map one copy into memory.

    Args:
        documents (`datasets.Dataset`): What [`~cm3leon_hf.retrieval.documents.make_documents`] makes.
        index (`faiss.Index`): Their vectors, in the same order.
        encoder (`str`): Name of the encoder that made the vectors.
        factory (`str`): FAISS's name of the index.
        exact (`np.ndarray` of shape `(documents, dimension)`, *optional*): The vectors, if the index has compressed
            ones.
        skipped (`list[dict]`): `id` and `reason` of each row of the source that is not in the bank.
        max_score (`float`): The score above which a document counts as a copy of the query, and is not retrieved. The
            paper's is 0.9 (section 2.1), for a CLIP whose texts and pictures lie far apart.
    """

    def __init__(
        self,
        documents: Dataset,
        index,
        encoder: str,
        factory: str,
        exact=None,
        skipped=(),
        max_score: float = MAX_SCORE,
    ):
        self.documents, self.index, self.encoder, self.factory = documents, index, encoder, factory
        self.max_score = max_score
        self._exact, self._skipped = exact, list(skipped)
        self.folder: Path | None = None

    @classmethod
    def from_vectors(
        cls, documents: Iterable[dict], vectors: np.ndarray, encoder: str, factory: str | None = None, skipped=()
    ) -> "MemoryBank":
        """
        A bank in memory.

        Args:
            documents (`Iterable[dict]`): See [`~cm3leon_hf.retrieval.documents.make_documents`].
            vectors (`np.ndarray` of shape `(documents, dimension)`): By `encoder.encode`.
            encoder (`str`): `encoder.name`.
            factory (`str`, *optional*): A factory string of FAISS; Flat below a million documents, by default.

        Raises:
            ValueError: for documents that [`make_documents`] refuses, ids that occur twice, NaN, another number of
                vectors than documents, or vectors of width 0.
        """
        documents, vectors = matched_documents(documents, vectors)
        factory = factory or choose_factory(*vectors.shape)
        index = trained_index(factory, *vectors.shape, vectors.__getitem__)
        index.add(vectors)
        return cls(documents, index, encoder, factory, None if factory == FLAT else vectors, skipped)

    @classmethod
    def build(
        cls,
        source: Dataset | IterableDataset,
        encoder: "CLIPEncoder",
        folder: str | PathLike,
        shard_size: int = 50_000,
        factory: str | None = None,
        max_score: float = MAX_SCORE,
    ) -> "MemoryBank":
        """
        Builds a bank in `folder`, through shards in a folder beside it that goes at the end.

        A build that was stopped, however hard, does the missing shards only, and gives the same bank as an unbroken
        one. To spread a build over machines, let each of them run [`~cm3leon_hf.retrieval.building.write_shards`] into
        `{folder}.shards`, and then one this.

        Args:
            source (`datasets.Dataset` or `datasets.IterableDataset`): Rows as in
                [`~cm3leon_hf.retrieval.documents.encode_rows`], the same in every run.
            encoder ([`CLIPEncoder`]): Makes the vectors.
            folder (path): Appears whole at the end, and takes the place of a bank that is there.
            shard_size (`int`): Rows in a shard: what a stopped build may lose. All shards are mapped at the end, so
                hundreds of millions of rows want larger ones.
            factory (`str`, *optional*): A factory string of FAISS; chosen by size, by default.
            max_score (`float`): The score above which a document counts as a copy of the query.

        Returns:
            [`MemoryBank`]: mapped from the folder. Its `skipped` lists the rows whose pictures could not be read.

        Raises:
            ValueError: for a source without a readable row, for ids that occur twice, and as
                [`~cm3leon_hf.retrieval.building.write_shards`].
        """
        from .building import SHARDS, write_shards  # it writes banks

        shards = Path(f"{folder}.shards")
        write_shards(source, encoder, shards, shard_size)
        banks = [cls.load(path, encoder.name) for path in sorted(shards.glob(SHARDS))]
        bank = cls.merge(banks, folder, factory, max_score)
        remove_folder(shards)
        return bank

    @classmethod
    def load(cls, folder: str | PathLike, encoder: str | None = None, verify: bool = False) -> "MemoryBank":
        """
        Maps a saved bank into memory.

        Sizes are always compared with the manifest. Checksums are not, since that reads every byte, which takes
        seconds for a million documents and an hour for hundreds of millions: ask for it after a copy.

        Args:
            folder (path): What [`save`] wrote.
            encoder (`str`, *optional*): `encoder.name` of the encoder that queries will come from.
            verify (`bool`): Whether to compare checksums too.

        Raises:
            ValueError: naming what is missing, truncated, damaged, or other than the manifest or you say.
        """
        folder = Path(folder).resolve()
        manifest = read_manifest(folder)
        files = manifest["files"]
        check_files(folder, files, verify)
        documents = read_documents([folder / name for name in sorted(files) if name.endswith(".arrow")])
        exact = read_vectors(folder / VECTORS) if VECTORS in files else None
        index = read_index(folder / INDEX, mapped=True)
        found = {"dimension": index.d, "count": index.ntotal, "documents": len(documents)}
        check_facts(manifest, found if exact is None else found | {"vectors": exact.shape}, encoder)
        bank = cls(documents, index, manifest["encoder"], manifest["factory"], exact, max_score=manifest["max_score"])
        bank.folder = folder
        return bank

    @classmethod
    def merge(
        cls,
        banks: list["MemoryBank"],
        folder: str | PathLike,
        factory: str | None = None,
        max_score: float | None = None,
    ) -> "MemoryBank":
        """
        Writes one bank with the documents of several, in their order, and loads it.

        The index is made anew for the whole size, trained on a sample of the vectors. Inverted lists are filled in
        parts and merged on disk by FAISS, so memory holds the sample and one part, never the whole index. (Lists that
        are packed for fast scans, graphs and Flat are filled in memory.)

        Args:
            banks (`list[MemoryBank]`): Banks of one encoder.
            folder (path): Appears whole at the end, and takes the place of a bank that is there.
            factory (`str`, *optional*): A factory string of FAISS; chosen by size, by default.
            max_score (`float`, *optional*): The score above which a document counts as a copy of the query; the first
                bank's by default.

        Raises:
            ValueError: if there is no document, encoders or dimensions differ, or an id occurs twice.
        """
        check_alike(banks)
        count, dimension = sum(len(bank) for bank in banks), banks[0].dimension
        factory = factory or choose_factory(count, dimension)
        max_score = banks[0].max_score if max_score is None else max_score
        facts = {"encoder": banks[0].encoder, "factory": factory, "max_score": max_score}
        index, unmerged = merged_index(banks, factory, (count, dimension))
        documents, exact = [bank.documents for bank in banks], None if factory == FLAT else chunks(banks)
        skipped = [row for bank in banks for row in bank.skipped]
        write_bank(Path(folder), facts, index, documents, exact, skipped, unmerged)
        return cls.load(folder)

    def __len__(self) -> int:
        return self.index.ntotal

    def __reduce__(self):
        if self.folder is None:
            raise ValueError("expected a saved bank, got one in memory, which workers cannot share; save it first")
        return _reopen, (str(self.folder), checksum(self.folder / MANIFEST))

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.index.d

    @property
    def is_exact(self) -> bool:
        """Whether the index compares queries with every vector as it is."""
        return self._exact is None

    @property
    def skipped(self) -> list[dict]:
        """`id` and `reason` of each row of the source that could not be read."""
        return json.loads((self.folder / SKIPPED).read_text("utf-8")) if self.folder is not None else self._skipped

    @property
    def ids(self) -> pa.ChunkedArray:
        return self.documents.data.column("id")

    @cached_property
    def multimodal(self) -> np.ndarray:
        """Which documents have a text and a picture: `bool` of shape `(documents,)`."""
        text, codes, image = (pc.is_valid(self.documents.data.column(name)) for name in ("text", "codes", "image"))
        return pc.and_(text, pc.or_(codes, image)).to_numpy()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """
        The documents with the largest inner products, best first.

        A compressed index proposes 32 times as many, and their exact vectors decide.

        Args:
            queries (`np.ndarray` of shape `(queries, dimension)`): float32.
            k (`int`): From 1 to the number of documents.

        Returns:
            Scores (float32) and row numbers (int64), `(queries, k)`. A compressed index may find fewer than k: then
            the last rows are -1 and their scores -inf.

        Raises:
            ValueError: for an empty bank, a wrong k, or queries that are NaN or of another dimension.
        """
        if not len(self):
            raise ValueError("expected a bank with documents, got an empty one; add documents first")
        if not 1 <= k <= len(self):
            raise ValueError(f"expected k from 1 to the bank's {len(self)} documents, got {k}")
        queries = checked_vectors(queries, self.dimension)
        if self.is_exact:
            return self.index.search(queries, k)
        return self._refined(queries, self.index.search(queries, min(len(self), REFINE * k))[1], k)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The exact vectors of some rows, `(rows, dimension)`."""
        if self._exact is not None:
            return self._exact[rows]
        return self.index.reconstruct_batch(np.asarray(rows, np.int64))

    def fetch(self, rows: list[int]) -> list[dict]:
        """Some documents, each with `id`, `text`, `codes`, `image` and `licence`."""
        columns = self.documents.select_columns(list(PUBLIC))[rows]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def is_copy(self, row: int, id: str, content: int) -> bool:
        """Whether a document has this id, or this content; see [`~cm3leon_hf.retrieval.documents.content_key`]."""
        contents = self.documents.data.column("content")
        return contents[row].as_py() == content or self.ids[row].as_py() == id

    def add(self, documents: Iterable[dict], vectors: np.ndarray) -> None:
        """
        Adds documents in memory; [`save`] keeps them. The index stays of its kind: [`merge`] chooses it anew.

        Raises:
            ValueError: as [`from_vectors`], and for ids that are in the bank, or vectors of another dimension.
        """
        documents, vectors = matched_documents(documents, vectors, self.dimension)
        check_ids([self.ids, documents.data.column("id")])
        skipped = self.skipped
        if self.folder is not None:
            self.index = read_index(self.folder / INDEX, mapped=False)  # a mapped one takes nothing
        self.index.add(vectors)
        self._exact = None if self._exact is None else np.concatenate([self._exact, vectors])
        self.documents = concatenate_datasets([self.documents, documents])
        self.folder, self._skipped = None, skipped
        self.__dict__.pop("multimodal", None)

    def save(self, folder: str | PathLike) -> None:
        """
        Writes the bank; the folder appears whole at the end, and takes the place of a bank that is there.

        It holds `index.faiss`, `documents-….arrow`, `skipped.json`, for a compressed index `vectors.npy`, and
        `manifest.json` with the encoder's name, dimension, metric, counts, and each file's size and checksum. Of an
        index that was merged on disk, the lists are a file of their own, `index.ivfdata`.

        Raises:
            ValueError: if something other than a bank lies there.
        """
        facts = {"encoder": self.encoder, "factory": self.factory, "max_score": self.max_score}
        exact = None if self._exact is None else [self._exact]
        write_bank(Path(folder), facts, self.index, [self.documents], exact, self.skipped)
        self.folder = Path(folder).resolve()

    def _refined(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full(rows.shape, -np.inf, np.float32)
        for query, row, own in zip(queries, rows, scores):
            own[row >= 0] = self._exact[row[row >= 0]] @ query
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


def _reopen(folder: str, manifest: str) -> MemoryBank:
    if checksum(Path(folder) / MANIFEST) != manifest:
        raise ValueError(f"expected the memory bank that was in {folder}, got another; load it again")
    return MemoryBank.load(folder)


__all__ = ["MemoryBank"]
