"""What the pictures of instruction rows retrieve, so that a model learns to name what it sees by its like."""

from dataclasses import replace

import numpy as np
from emoji_corpus import Picture
from emoji_instructions import Split, pair
from tqdm.auto import tqdm

from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter

CANDIDATES, BATCH = 4, 256


def retrieve_for(split: Split, augmenter: RetrievalAugmenter) -> dict[str, dict]:
    """
    By source, the best document for each picture of a split, as a picture that nobody has seen would find it.

    So no document shows the picture's own concept in its own style: of a held-out pair there is none.

    Args:
        split ([`Split`]): With its pictures as pixels.
        augmenter ([`RetrievalAugmenter`]): Over documents whose ids are sources of training pictures.

    Raises:
        ValueError: if the bank has documents that are no training pictures.
    """
    training = {one.source: one for one in split.training}
    augmenter = replace(augmenter, training=False, count=CANDIDATES, per_query=CANDIDATES)
    found = {}
    for start in tqdm(range(0, len(split.pictures), BATCH), desc="retrieving"):
        shown = split.pictures[start : start + BATCH]
        queries = [{"id": one.source, "codes": one.codes, "image": split.images[one.index]["image"]} for one in shown]
        for one, documents in zip(shown, augmenter.retrieve(queries)):
            for document in reversed(documents):  # the best one stays
                if is_other(document, one, training):
                    found[one.source] = {"text": document["text"], "codes": document["codes"]}
    return found


def is_other(document: dict, shown: Picture, training: dict[str, Picture]) -> bool:
    if document["id"] not in training:
        raise ValueError(
            f"expected a bank of the corpus' training pictures, found a document {document['id']!r} that is none; "
            "build the bank of this corpus"
        )
    return pair(training[document["id"]]) != pair(shown)


def with_documents(rows: list[dict], found: dict[str, dict], share: float, rng: np.random.Generator) -> list[dict]:
    """The rows of one task, so many of them behind the document that their picture retrieves."""
    kept = rng.random(len(rows)) < share
    documents = [[found[row["source"]]] if keep and row["source"] in found else [] for row, keep in zip(rows, kept)]
    return [row | {"retrieved": documents} for row, documents in zip(rows, documents)]
