"""A memory bank on disk: a folder that appears whole or not at all, and a manifest that knows what must lie in it."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .documents import FEATURES
from .extra import Dataset, concatenate_datasets, faiss, pa
from .indexes import merge_on_disk, write_index

MANIFEST, INDEX, VECTORS, SKIPPED = "manifest.json", "index.faiss", "vectors.npy", "skipped.json"
DOCUMENTS = "documents-{:05d}.arrow"
METRIC = "inner_product"
ROWS = 10_000  # documents in one record batch: a process that maps a bank reads the head of each
BLOCK = 1 << 20  # bytes read at a time


def write_bank(
    folder: Path,
    facts: dict,
    index: "faiss.Index",
    documents: list[Dataset],
    vectors: Iterable[np.ndarray] | None,
    skipped: list[dict],
    unmerged: Iterable[np.ndarray] | None = None,
) -> None:
    """
    Writes a bank; the folder appears whole at the end, and takes the place of a bank that is there.

    Args:
        folder (path): See [`new_folder`].
        facts (`dict`): `encoder`, `factory` and `max_score`, for the manifest.
        index (`faiss.Index`): Its index.
        documents (`list[datasets.Dataset]`): Its documents; each data set becomes a file.
        vectors (`Iterable[np.ndarray]`, *optional*): The exact vectors, a chunk at a time, beside a compressed index.
        skipped (`list[dict]`): Rows of the source that are not in the bank.
        unmerged (`Iterable[np.ndarray]`, *optional*): What is still to be merged into the index on disk.

    Raises:
        ValueError: if something other than a bank is in the place.
    """
    with new_folder(folder) as part:
        if unmerged is not None:
            merge_on_disk(index, unmerged, part)
        write_index(index, part / INDEX)
        for number, rows in enumerate(documents):
            write_documents(rows, part / DOCUMENTS.format(number))
        if vectors is not None:
            write_vectors(vectors, part / VECTORS, (index.ntotal, index.d))
        (part / SKIPPED).write_text(json.dumps(skipped, indent=1), "utf-8")
        write_manifest(part, facts | {"dimension": index.d, "count": index.ntotal, "skipped": len(skipped)})


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """
    A folder beside `target` that takes its place at the end; what a killed run left there is removed.

    Raises:
        ValueError: if something other than a bank is in the place.
    """
    if target.exists() and not (target / MANIFEST).exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"expected a memory bank or nothing in {target}, got something else; choose another folder")
    part, old = target.with_name(f".{target.name}.part"), _old(target)
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for stale in (part, old):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Removes a folder so that it is whole or gone, even if this is killed."""
    shutil.rmtree(_old(target), ignore_errors=True)
    target.rename(_old(target))
    shutil.rmtree(_old(target))


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def write_documents(documents: Dataset, path: Path) -> None:
    """Writes documents as an Arrow stream, which `datasets` maps into memory."""
    schema = FEATURES.arrow_schema
    table = documents.data.table.cast(schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=ROWS)


def read_documents(paths: list[Path]) -> Dataset:
    """
    Maps documents into memory.

    Raises:
        ValueError: if a file is no Arrow stream, or is damaged, or holds other columns.
    """
    tables = []
    for path in paths:
        try:
            tables.append(Dataset.from_file(str(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"expected documents in {path}, could not read them: {error}; copy it again") from error
        if tables[-1].features != FEATURES:
            raise ValueError(f"expected the columns {list(FEATURES)} in {path}, got {tables[-1].column_names}")
    return concatenate_datasets(tables)


def write_vectors(chunks: Iterable[np.ndarray], path: Path, shape: tuple[int, int]) -> None:
    """Writes vectors, a chunk at a time."""
    vectors, start = np.lib.format.open_memmap(path, "w+", np.float32, shape), 0
    for chunk in chunks:
        vectors[start : start + len(chunk)] = chunk
        start += len(chunk)
    vectors.flush()


def read_vectors(path: Path) -> np.ndarray:
    """
    Maps vectors `(documents, dimension)` into memory.

    Raises:
        ValueError: if the file is no array, or is damaged.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise ValueError(f"expected vectors in {path}, could not read them: {error}; copy it again") from error


def write_manifest(folder: Path, facts: dict) -> None:
    """Writes the manifest, with the size and the checksum of every file in the folder; it comes last."""
    files = {
        path.name: {"bytes": path.stat().st_size, "blake2b": checksum(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(facts | {"metric": METRIC, "files": files}, indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> dict:
    """
    The manifest's `encoder`, `dimension`, `metric`, `factory`, `count`, `skipped` and `files`.

    Raises:
        ValueError: if there is none, it is damaged, or it is of a bank with another metric.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"expected a memory bank in {folder}, found no {MANIFEST}; check the path or build the bank")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        wrong = {"encoder", "dimension", "metric", "factory", "count", "skipped", "files"} - set(manifest)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a manifest in {path}, could not read it: {error}; copy it again") from error
    if wrong or manifest["metric"] != METRIC:
        raise ValueError(
            f"expected the metric {METRIC} and no gaps in {path}, got {sorted(wrong) or manifest['metric']}"
        )
    return manifest


def check_facts(manifest: dict, found: dict, encoder: str | None) -> None:
    """
    Compares what was found in a bank's files with its manifest, and its encoder with the one that is to be used.

    Raises:
        ValueError: naming the first difference.
    """
    count, dimension = manifest["count"], manifest["dimension"]
    wanted = {"dimension": dimension, "count": count, "documents": count, "vectors": (count, dimension)}
    wanted["encoder"] = encoder or manifest["encoder"]
    for name, value in (found | {"encoder": manifest["encoder"]}).items():
        if value != wanted[name]:
            raise ValueError(f"expected {name} {wanted[name]} of the bank, got {value}; load what belongs together")


def check_files(folder: Path, files: dict[str, dict], verify: bool) -> None:
    """
    Compares every file's size with the manifest's, and with `verify` its checksum too, which reads it whole.

    Raises:
        ValueError: naming the first file that is missing or differs.
    """
    for name, fact in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"expected {name} in {folder}, found none; copy the bank again")
        if path.stat().st_size != fact["bytes"]:
            raise ValueError(
                f"expected {fact['bytes']} bytes in {path}, got {path.stat().st_size}; it is truncated or of another "
                "bank, copy it again"
            )
        if verify and checksum(path) != fact["blake2b"]:
            raise ValueError(f"expected the checksum of the manifest for {path}, got another; copy it again")


def checksum(path: Path) -> str:
    """32 digits of BLAKE2b."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
