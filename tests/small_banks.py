"""Small memory banks: an encoder without weights, texts, random vectors, and a source with broken pictures."""

import io
import zlib

import numpy as np
import torch
from conftest import COLOURS, SHAPES, draw
from datasets import Dataset, Features, Image, List, Value

from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank

DIMENSION, ENCODER = 16, "test@0"
COMPRESSED = "IVF8,SQ4"  # coarse, and trained in no time
SOURCE = Features({"id": Value("int64"), "text": Value("string"), "image": Image(), "codes": List(Value("int64"))})


class SeededEncoder(CLIPEncoder):
    """Unit vectors drawn from the bytes of what they stand for; dropout draws other ones."""

    def __init__(self, name: str = ENCODER):
        self.name, self.arguments, self.dimension, self.batch_size = name, (name,), DIMENSION, 3

    def embed_texts(self, texts, rngs=None, dropout=0.2):
        return self.draw([text.encode() for text in texts], rngs)

    def embed_images(self, images, rngs=None, dropout=0.2):
        return self.draw([image.tobytes() for image in images], rngs)

    def draw(self, values, rngs):
        rngs = [
            np.random.default_rng(zlib.crc32(v) + (rngs[i].integers(9) if rngs else 0)) for i, v in enumerate(values)
        ]
        vectors = [torch.from_numpy(rng.standard_normal(DIMENSION, np.float32)) for rng in rngs]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1) if vectors else torch.zeros(0, DIMENSION)


def png(image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def texts(count: int, start: int = 0) -> list[dict]:
    return [{"id": f"t{row}", "text": f"text {row}"} for row in range(start, start + count)]


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIMENSION), np.float32)


def bank_of(count: int, seed: int = 0, **options) -> MemoryBank:
    return MemoryBank.from_vectors(texts(count), vectors(count, seed), ENCODER, **options)


def same(one: MemoryBank, other: MemoryBank) -> bool:
    rows = np.arange(len(one))
    return len(one) == len(other) and (
        one.documents.to_list() == other.documents.to_list()
        and (one.vectors(rows) == other.vectors(rows)).all()
        and (one.search(vectors(5, 9), 3)[1] == other.search(vectors(5, 9), 3)[1]).all()
        and one.skipped == other.skipped
    )


def broken_source() -> Dataset:
    """Pictures with captions, two of them broken, and documents with one part only."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rows = [
        {"id": row, "text": f"a {' '.join(pair)}", "image": png(draw(*pair)), "codes": [row] * 4}
        for row, pair in enumerate(pairs)
    ]
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:60]
    rows[4]["image"]["bytes"] = b"no picture"
    rows += [{"id": 8, "text": "words alone"}, {"id": 9, "image": png(draw("black", "square")), "codes": [9] * 4}]
    rows = [{"id": None, "text": None, "image": None, "codes": None} | row for row in rows]
    return Dataset.from_list(rows, features=SOURCE)
