"""Retrieved documents in front of training documents (paper, section 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..retrieval.augmenter import RetrievalAugmenter


@dataclass
class RetrievalTransform:
    """
    Adds retrieved documents to batches of rows, for [`~cm3leon_hf.data.pretraining.CM3Transform`] behind it.

    All rows of one batch get equally many, so that batches hold little padding; how many is drawn for each batch.

    Args:
        augmenter ([`~cm3leon_hf.retrieval.augmenter.RetrievalAugmenter`]): Chooses the documents.
        shares (`Sequence[float]`): Share of the batches with 0, 1, 2 … documents for each row; they sum to 1.
        rng (`np.random.Generator`): Source of the draws: of each row's wording, which is its query, and the numbers.

    Raises:
        ValueError: if the shares do not sum to 1.
    """

    augmenter: RetrievalAugmenter
    shares: Sequence[float]
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def __post_init__(self):
        if not np.isclose(sum(self.shares), 1) or min(self.shares) < 0:
            raise ValueError(f"expected shares that sum to 1, got {list(self.shares)}; one for each number from 0 on")

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows with `image`, `captions` and `codes` to rows with one caption, `codes` and `retrieved`."""
        texts = [captions[self.rng.integers(len(captions))] for captions in rows["captions"]]
        count = int(self.rng.choice(len(self.shares), p=self.shares))
        augmenter = replace(self.augmenter, training=True, count=count, seed=int(self.rng.integers(2**31)))
        queries = [
            {"text": text, "image": image, "codes": codes}
            for text, image, codes in zip(texts, rows["image"], rows["codes"])
        ]
        retrieved = augmenter.retrieve(queries) if count else [[]] * len(texts)
        return {"captions": [[text] for text in texts], "codes": rows["codes"], "retrieved": retrieved}
