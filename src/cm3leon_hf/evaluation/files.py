"""What an evaluation writes: whole or not at all; and what it reads: pictures, named when they are broken."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from PIL import Image

from ..images import read_image


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` that takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_pictures(sources: Iterable, skip_broken: bool = False) -> Iterator[Image.Image]:
    """
    Pictures in RGB, one after the other.

    Args:
        sources (`Iterable`): Anything [`~cm3leon_hf.images.read_image`] reads, or undecoded cells of a data set.
        skip_broken (`bool`): Whether to leave out, and say so, what cannot be read.

    Raises:
        ValueError: naming the first picture that cannot be read.
    """
    for number, source in enumerate(sources):
        if (picture := _read(source, number, skip_broken)) is not None:
            yield picture


def readable_rows(rows, column: str, skip_broken: bool = False):
    """
    Rows of a data set whose pictures can all be read; the pictures stay undecoded.

    Args:
        rows (`datasets.Dataset`): With pictures.
        column (`str`): Where they are.
        skip_broken (`bool`): Whether to leave out, and say so, what cannot be read.

    Raises:
        ValueError: naming the first picture that cannot be read.
    """
    from datasets import Image as ImageFeature

    rows = rows.cast_column(column, ImageFeature(decode=False))
    cells = enumerate(rows[column])
    return rows.select([number for number, cell in cells if _read(cell, number, skip_broken) is not None])


def _read(source, number: int, skip_broken: bool) -> Image.Image | None:
    stored, name = source, f"number {number}"
    if isinstance(source, dict):
        stored, name = source["bytes"] or source["path"], source["path"] or name
    elif isinstance(source, (str, Path)):
        name = source
    try:
        return read_image(stored)
    except ValueError as error:
        if not skip_broken:
            raise ValueError(f"picture {name}: {error}; mend it, or skip broken pictures") from error
        print(f"skipped picture {name}: {error}")
        return None


def batched(values: Iterable, size: int) -> Iterator[list]:
    """Lists of at most `size` values."""
    values = iter(values)
    while batch := list(islice(values, size)):
        yield batch


def content_hash(pictures: Iterable[Image.Image], *words: str) -> str:
    """32 digits that depend on every pixel, the order of the pictures, and the words."""
    digest = hashlib.blake2b("\0".join(words).encode(), digest_size=16)
    for picture in pictures:
        digest.update(f"{picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def check_as_many(what: str, values: Sequence, other: str, others: Sequence) -> None:
    """
    Raises:
        ValueError: if there are not as many of the ones as of the others, or none.
    """
    if len(values) != len(others) or len(values) == 0:
        raise ValueError(f"expected {what} for all {other}, got {len(values)} for {len(others)}; match them")


__all__ = ["atomic", "batched", "check_as_many", "content_hash", "read_pictures", "readable_rows"]
