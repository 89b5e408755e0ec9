"""What a memory bank holds of each document, and how rows of a source become documents with vectors."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .extra import Dataset, Features, List, Value, pa, pc
from .indexes import checked_vectors

if TYPE_CHECKING:
    from .encoder import CLIPEncoder

PUBLIC = {
    "id": Value("string"),
    "text": Value("string"),
    "codes": List(Value("uint16")),
    "image": Value("string"),
    "licence": Value("string"),
}
FEATURES = Features(PUBLIC | {"content": Value("uint64")})
RETRIEVED = List(PUBLIC | {"score": Value("float32")})  # the column that the augmenter adds
MAX_CODE = 65535
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of Pillow's messages; it would make every report another one


def read_picture(stored) -> Image.Image | None:
    """
    The picture of a row's `image`: anything [`~cm3leon_hf.images.read_image`] reads, an undecoded cell, or `None`.

    Raises:
        ValueError: if it cannot be read.
    """
    from ..images import read_image  # brings torch and transformers, which a search can do without

    if isinstance(stored, dict):
        stored = stored["bytes"] or stored["path"]
    return None if stored is None else read_image(stored)


def document_picture(document: dict, processor) -> Image.Image | None:
    """
    What a retrieved document shows, or `None`.

    Args:
        document (`dict`): As [`~cm3leon_hf.retrieval.augmenter.RetrievalAugmenter`] gives it.
        processor ([`~cm3leon_hf.processing_cm3leon.CM3LeonProcessor`]): Decodes codes.
    """
    if document["codes"] is None:
        return read_picture(document["image"])
    import torch  # a search can do without

    return processor.decode_images(torch.tensor([document["codes"]]))[0]


def document_cells(retrieved: list[list[dict]], processor) -> list[list[tuple[Image.Image | None, str]]]:
    """
    What each prompt retrieved, for [`~cm3leon_hf.grid.draw_grid`]: pictures with labels, as many for every prompt.

    Args:
        retrieved (`list[list[dict]]`): For each prompt its documents; where there are fewer, cells stay empty.
        processor ([`~cm3leon_hf.processing_cm3leon.CM3LeonProcessor`]): Decodes codes.
    """
    places = max(map(len, retrieved), default=0)
    return [
        [(document_picture(one, processor), f"retrieved: {one['text']}") for one in documents]
        + [(None, "")] * (places - len(documents))
        for documents in retrieved
    ]


def content_key(codes, picture: Image.Image | None, text: str | None) -> int:
    """
    64 bits that documents share when one is a copy of the other.

    Ours: a document is known by its picture, and by its text only if it has no picture. The same picture under another
    caption is a copy, for a model could read the answer off it; another picture under the same caption is not.

    Args:
        codes (`Sequence[int]`, *optional*): The picture's codes; they stand for it where they are known.
        picture (`PIL.Image.Image`, *optional*): The picture.
        text (`str`, *optional*): The text.
    """
    if codes is not None:
        return _key(b"codes", np.asarray(codes, np.uint16).tobytes())
    if picture is not None:
        return _key(b"pixels", f"{picture.size}".encode(), picture.tobytes())
    return _key(b"text", (text or "").encode())


def make_documents(rows: Iterable[dict]) -> Dataset:
    """
    Rows to documents.

    Args:
        rows (`Iterable[dict]`): Each with `id`, and with `text`, or a picture, or both; `licence` if it is known. The
            picture is there as `codes`, or as a path or address in `image`: a bank keeps no pixels.

    Returns:
        `datasets.Dataset` with the columns `id`, `text`, `codes`, `image`, `licence` and `content`; one that has them
        already keeps them.

    Raises:
        ValueError: for a row without an id, with an empty caption, with nothing, with wrong codes, or with a picture
            that cannot be read or that the bank could not show.
    """
    if isinstance(rows, Dataset) and rows.features == FEATURES:
        return Dataset(rows.with_format("arrow")[:].cast(FEATURES.arrow_schema))  # without gaps, if rows were selected
    return _table([_document(row, None if _has_codes(row) else read_picture(row.get("image"))) for row in rows])


def check_ids(columns: list[pa.ChunkedArray]) -> None:
    """
    Raises:
        ValueError: if an id occurs twice in these columns.
    """
    counts = pc.value_counts(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))
    twice = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))[:3]]
    if twice:
        raise ValueError(f"expected every id once, got {twice} more than once; number the sources apart")


def matched_documents(
    documents: Iterable[dict], vectors: np.ndarray, dimension: int | None = None
) -> tuple[Dataset, np.ndarray]:
    """
    Documents and their vectors, checked.

    Args:
        documents (`Iterable[dict]`): See [`make_documents`].
        vectors (`np.ndarray` of shape `(documents, dimension)`): A vector for each.
        dimension (`int`, *optional*): Their width; that of the vectors, by default.

    Raises:
        ValueError: for documents that [`make_documents`] refuses, ids that occur twice, NaN, another number of vectors
            than documents, or vectors of another width, or of width 0.
    """
    vectors = np.asarray(vectors)
    vectors = checked_vectors(vectors, dimension or (vectors.shape[1] if vectors.ndim == 2 else 0))
    documents = make_documents(documents)
    if len(documents) != len(vectors):
        raise ValueError(f"expected a vector for each document, got {len(vectors)} for {len(documents)}; match them")
    check_ids([documents.data.column("id")])
    return documents, vectors


def encode_rows(rows: Iterable[dict], encoder: "CLIPEncoder") -> tuple[Dataset, np.ndarray, list[dict]]:
    """
    Rows to documents and their vectors; rows whose pictures cannot be read are left out.

    Args:
        rows (`Iterable[dict]`): As in [`make_documents`], with pictures in `image`.
        encoder ([`CLIPEncoder`]): Makes the vectors.

    Returns:
        The documents, their vectors `(documents, dimension)`, and `id` and `reason` of each row that is left out.

    Raises:
        ValueError: as [`make_documents`], but for pictures that cannot be read.
    """
    documents, vectors, skipped = [], [np.zeros((0, encoder.dimension), np.float32)], []
    for batch in _batches(rows, encoder.batch_size):
        pictures = []
        for row in batch:
            try:
                picture = read_picture(row.get("image"))
            except ValueError as error:
                skipped.append({"id": str(row.get("id")), "reason": ADDRESS.sub("", str(error))})
                continue
            documents.append(_document(row, picture))
            pictures.append(picture)
        texts = [document["text"] for document in documents[len(documents) - len(pictures) :]]
        _check_pictures(documents[len(documents) - len(pictures) :], pictures)
        vectors.append(encoder.encode(texts, pictures))
    return _table(documents), np.concatenate(vectors), skipped


def _document(row: dict, picture: Image.Image | None) -> dict:
    name, text = row.get("id"), row.get("text")
    if name is None or not str(name).strip():
        raise ValueError("expected an id in every row, got one without; number the rows")
    if text is not None and not text.strip():
        raise ValueError(f"expected a caption or None, got an empty caption in row {name!r}; leave the row out")
    codes = _codes(row)
    image = _reference(row.get("image"))
    if text is None and codes is None and image is None and picture is None:
        raise ValueError(f"expected a text or a picture, got neither in row {name!r}; leave it out")
    if picture is not None and codes is None and image is None:
        raise ValueError(f"expected codes or a path of the picture in row {name!r}, got pixels; tokenize it first")
    key = content_key(codes, picture, text)
    return {"id": str(name), "text": text, "codes": codes, "image": image, "licence": row.get("licence")} | {
        "content": key
    }


def _check_pictures(documents: list[dict], pictures: list[Image.Image | None]) -> None:
    for document, picture in zip(documents, pictures):
        if picture is None and document["codes"] is not None:
            raise ValueError(
                f"expected the picture of the codes in row {document['id']!r}, got codes alone, which CLIP cannot see; "
                "keep the column image"
            )


def _codes(row: dict) -> np.ndarray | None:
    if row.get("codes") is None:
        return None
    codes = np.asarray(row["codes"])
    if not (codes.size and codes.min() >= 0 and codes.max() <= MAX_CODE):
        raise ValueError(
            f"expected codes from 0 to {MAX_CODE}, got others or none in row {row['id']!r}; tokenize again"
        )
    return codes.astype(np.uint16)


def _has_codes(row: dict) -> bool:
    return row.get("codes") is not None


def _reference(stored) -> str | None:
    """Where a picture lies, if it lies anywhere."""
    if isinstance(stored, dict):
        return None if stored["bytes"] else stored["path"]
    return str(stored) if isinstance(stored, (str, Path)) else None


def _table(documents: list[dict]) -> Dataset:
    columns = {name: [document[name] for document in documents] for name in FEATURES}
    return Dataset(pa.Table.from_pydict(columns, FEATURES.arrow_schema))


def _batches(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _key(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"\0".join(parts), digest_size=8).digest(), "little")


__all__ = [
    "FEATURES",
    "RETRIEVED",
    "check_ids",
    "content_key",
    "document_cells",
    "document_picture",
    "encode_rows",
    "make_documents",
    "matched_documents",
    "read_picture",
]
