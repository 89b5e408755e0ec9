"""What the pictures of instruction rows retrieve, so that a model learns to name what it sees by its like."""

from dataclasses import replace
from itertools import islice

import numpy as np
from datasets import Dataset
from emoji_corpus import Picture
from emoji_instructions import pair
from tqdm.auto import tqdm

from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter

CANDIDATES, BATCH = 16, 256


Found = dict[str, list[tuple[Picture, dict]]]


def retrieve_for(
    pictures: list[Picture], images: Dataset, training: list[Picture], augmenter: RetrievalAugmenter
) -> tuple[Found, Found]:
    """
    By source, the documents for each picture, as a picture that nobody has seen would find them, the best first.

    So no document shows the picture's own concept in its own style: of a held-out pair there is none.

    Args:
        pictures (`list[Picture]`): What to retrieve for.
        images (`Dataset`): The same as pixels.
        training (`list[Picture]`): What the documents show, whose ids are their sources.
        augmenter ([`RetrievalAugmenter`]): Over these documents.

    Returns:
        `tuple[dict, dict]`: lists of what a document shows, and its `text` and `codes`: the nearest first, and the same
        with those first whose texts describe the picture best.

    Raises:
        ValueError: if the bank has documents that are no training pictures.
    """
    known = {one.source: one for one in training}
    augmenter = replace(augmenter, training=False, count=CANDIDATES, per_query=CANDIDATES)
    nearest, described = {}, {}
    for start in tqdm(range(0, len(pictures), BATCH), desc="retrieving"):
        shown = pictures[start : start + BATCH]
        queries = [{"id": one.source, "codes": one.codes, "image": images[one.index]["image"]} for one in shown]
        found = augmenter.retrieve(queries)
        by_text = augmenter.by_text([query["image"] for query in queries], found)
        for kept, several in ((nearest, found), (described, by_text)):
            kept |= {one.source: of_other_pairs(one, documents, known) for one, documents in zip(shown, several)}
    return nearest, described


def of_other_pairs(one: Picture, documents: list[dict], known: dict[str, Picture]) -> list[tuple[Picture, dict]]:
    like = [(training_picture(document, known), document) for document in documents]
    return [
        (other, {"text": document["text"], "codes": document["codes"]})
        for other, document in like
        if pair(other) != pair(one)
    ]


def training_picture(document: dict, known: dict[str, Picture]) -> Picture:
    if document["id"] not in known:
        raise ValueError(
            f"expected a bank of the corpus' training pictures, found a document {document['id']!r} that is none; "
            "build the bank of this corpus"
        )
    return known[document["id"]]


def with_documents(
    rows: list[dict],
    found: Found,
    share: float,
    misled: float,
    rng: np.random.Generator,
) -> list[dict]:
    """
    The rows of one task, so many of them behind the best document that the picture retrieves which they read.

    It does not show what is to be drawn either, in the style that it is to have.

    Args:
        rows (`list[dict]`): As `emoji_documents` makes them.
        found (`dict`): As [`retrieve_for`] returns them.
        share (`float`): Of rows with a document.
        misled (`float`): Of these, the share whose document is the best one of another concept. Training pictures
            retrieve their own concept more often than those that nobody has seen, and what a model is to do without
            that has to be learned too.
        rng (`np.random.Generator`): Source of all draws.
    """
    kept, astray = rng.random(len(rows)) < share, rng.random(len(rows)) < misled
    return [
        row | {"retrieved": best_for(row, found, other) if keep else []} for row, keep, other in zip(rows, kept, astray)
    ]


def best_for(row: dict, found: Found, other_concept: bool) -> list[dict]:
    others = (
        document
        for shown, document in found.get(row["read"], ())
        if pair(shown) != (row["concept"], row["style"]) and not (other_concept and shown.concept == row["concept"])
    )
    return list(islice(others, 1))
