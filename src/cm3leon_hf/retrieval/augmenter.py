"""Retrieved documents for every training row and every prompt (paper, section 2.1)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from .documents import content_key, read_picture
from .encoder import CLIPEncoder
from .memory_bank import MemoryBank

DEEPEST = 1024  # candidates of one query at most, however many of them are skipped
VECTORS = 1 << 15  # of candidates, held at a time
DESCRIBING = 16  # nearest documents among which those that describe a picture best are found
SMALLEST = np.finfo(np.float32).tiny  # in place of the length of a vector of zeros


class Found(NamedTuple):
    """A document's row in the bank, its inner product with the query that found it, and its vector's direction."""

    row: int
    score: float
    vector: np.ndarray


class Source(NamedTuple):
    """What a query came from, so that it does not retrieve itself: its `id` and [`content_key`]."""

    id: str
    content: int


@dataclass(frozen=True, eq=False)
class RetrievalAugmenter:
    """
    Adds the column `retrieved` to batches of rows; for `datasets.map(batched=True)` and `set_transform`.

    A row has two queries: its picture's unit vector and its text's. Each takes `per_query` documents, the picture
    first, from its most relevant candidates: those with text and picture before others, then by inner product. Skipped
    are documents that score above `max_score`, copies of the row, and those too similar to one already taken. Of all
    that is taken, training draws `count` at random; otherwise the `count` with the highest scores stay.

    The draws depend on the seed and on the row's own content, so the same rows get the same documents in any order, in
    batches of any size, and with any number of workers (up to the rounding of the encoder, which may depend on the
    batch). For other draws in another epoch, use `dataclasses.replace(augmenter, seed=epoch)`.

    Args:
        bank ([`MemoryBank`]): What to retrieve from; a saved one, if workers are to share it.
        encoder ([`CLIPEncoder`]): The one that made the bank's vectors.
        training (`bool`): Whether to drop tokens of the queries, and draw among the documents.
        count (`int`): Documents for each row, if there are so many; from 0 to `2 * per_query`.
        seed (`int`): Fixes all draws; 0 or more.
        per_query (`int`): Documents that the picture and the text retrieve, each.
        max_score (`float`, *optional*): The highest inner product of a document with its query, by default the bank's,
            which is 0.9 in the paper. Ours: also the highest cosine of
            two documents of one row. The cosine, for a document's vector is a mean shorter than 1, and the inner
            product of two copies would not reach the limit.
        query_dropout (`float`): Share of each query's tokens that training drops.
        candidates (`int`): Most relevant documents among which those with text and picture come first. Ours: if too
            few of them may be taken, four times as many are searched, up to 1024.

    Raises:
        ValueError: for another encoder than the bank's, or a count out of range.
    """

    bank: MemoryBank
    encoder: CLIPEncoder
    training: bool = True
    count: int = 3
    seed: int = 0
    per_query: int = 2
    max_score: float | None = None
    query_dropout: float = 0.2
    candidates: int = 32

    def __post_init__(self):
        if self.encoder.name != self.bank.encoder:
            raise ValueError(f"expected the bank's encoder {self.bank.encoder}, got {self.encoder.name}; build it anew")
        if not 0 <= self.count <= 2 * self.per_query:
            raise ValueError(f"expected a count from 0 to {2 * self.per_query}, got {self.count}; raise per_query")

    @property
    def limit(self) -> float:
        """The highest score that counts as another document."""
        return self.bank.max_score if self.max_score is None else self.max_score

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """
        Rows to the same rows with `retrieved`.

        Args:
            rows (`dict[str, list]`): Columns `text` or `image` or both, and `id` and `codes` if there are any. Without
                a picture in `image`, codes alone are no query.

        Returns:
            The columns and `retrieved`: for each row a list of documents, best first, each a `dict` with `id`,
            `text`, `codes`, `image`, `licence` and `score`. In `datasets.map`, give this column the feature
            [`~cm3leon_hf.retrieval.documents.RETRIEVED`].

        Raises:
            ValueError: for a picture that cannot be read, an empty text, or an empty bank.
        """
        examples = [dict(zip(rows, values)) for values in zip(*rows.values())]
        return {**rows, "retrieved": self.retrieve(examples)}

    def for_prompts(self, prompts: list[str], count: int = 2) -> list[list[dict]]:
        """
        Documents for prompts at generation: the `count` best for each, without dropout or draws.

        Args:
            prompts (`list[str]`): What to draw.
            count (`int`): 0, 1 or 2 in the paper; up to `per_query`.

        Returns:
            For each prompt its documents, best first, as `__call__` gives them.

        Raises:
            ValueError: for an empty prompt, an empty bank, or a count out of range.
        """
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("expected prompts that are not empty, got an empty one; say what you want to see")
        return self._best([{"text": prompt} for prompt in prompts], count)

    def for_pictures(self, pictures: list[Image.Image], count: int = 1, by_text: bool = False) -> list[list[dict]]:
        """
        Documents for pictures to write about or to edit: the `count` best for each, without dropout or draws.

        Args:
            pictures (`list[PIL.Image.Image]`): What to describe, or to edit.
            count (`int`): 0, 1 or 2 in the paper; up to `per_query`.
            by_text (`bool`): Ours: whether to take, of the 16 nearest documents, those whose texts describe the picture
                best. They show the same thing more often, and look alike less often, which an edit does not need.

        Returns:
            For each picture its documents, best first, as `__call__` gives them.

        Raises:
            ValueError: for an empty bank, or a count out of range.
        """
        queries = [{"image": picture} for picture in pictures]
        if not by_text:
            return self._best(queries, count)
        self._check(count)
        nearest = replace(self, training=False, per_query=DESCRIBING, count=DESCRIBING).retrieve(queries)
        return [documents[:count] for documents in self.by_text(pictures, nearest)]

    def by_text(self, pictures: list[Image.Image], found: list[list[dict]]) -> list[list[dict]]:
        """
        The documents of each picture, sorted by the similarity of their texts to it.

        Args:
            pictures (`list[PIL.Image.Image]`): In RGB.
            found (`list[list[dict]]`): For each of them its documents; those without text come last.

        Returns:
            The same documents, the one whose text describes the picture best first.
        """
        texts = sorted({document["text"] for documents in found for document in documents if document["text"]})
        vectors = self.encoder.embed_images(pictures) @ self.encoder.embed_texts(texts).T
        likeness = [dict(zip(texts, row)) for row in vectors.tolist()]
        return [
            sorted(documents, key=lambda document: -likeness[at].get(document["text"], -1.0))
            for at, documents in enumerate(found)
        ]

    def _best(self, examples: list[dict], count: int) -> list[list[dict]]:
        self._check(count)
        return replace(self, training=False, count=count).retrieve(examples)

    def _check(self, count: int) -> None:
        if not 0 <= count <= self.per_query:
            raise ValueError(f"expected a count from 0 to {self.per_query}, got {count}; raise per_query")

    def retrieve(self, examples: list[dict]) -> list[list[dict]]:
        """Documents for rows, each a `dict` with `text`, `image`, `codes` and `id` as far as it has them."""
        pictures = [read_picture(example.get("image")) for example in examples]
        texts = [example.get("text") for example in examples]
        for example, text in zip(examples, texts):
            if text is not None and not text.strip():
                raise ValueError(f"expected a text or None, got an empty text in row {example.get('id')!r}; drop it")
        sources = [
            Source(str(example.get("id", "")), content_key(example.get("codes"), picture, example.get("text")))
            for example, picture in zip(examples, pictures)
        ]
        rngs = [self.generator(source, text) for source, text in zip(sources, texts)]
        queries = zip(
            self._embed(self.encoder.embed_images, pictures, rngs), self._embed(self.encoder.embed_texts, texts, rngs)
        )
        return self._fetch(self.select(list(queries), sources, rngs))

    def generator(self, source: Source, text: str | None) -> np.random.Generator:
        """The row's own source of draws."""
        words = hashlib.blake2b(f"{source.id}\0{text}".encode(), digest_size=8).digest()
        return np.random.default_rng([self.seed, source.content, int.from_bytes(words, "little")])

    def select(
        self,
        queries: list[tuple[np.ndarray | None, np.ndarray | None]],
        sources: list[Source],
        rngs: list[np.random.Generator],
    ) -> list[list[Found]]:
        """
        The strategy, from the queries' vectors on.

        Args:
            queries (`list[tuple]`): For each row its picture's vector and its text's, `(dimension,)` or `None`.
            sources (`list[Source]`): What each row is.
            rngs (`list[np.random.Generator]`): Each row's source of draws; not touched outside training.

        Returns:
            For each row what is retrieved, best first.
        """
        asked = [(part, row) for part in (0, 1) for row, pair in enumerate(queries) if pair[part] is not None]
        if not asked or not self.count:
            return [[] for _ in queries]
        vectors = np.stack([queries[row][part] for part, row in asked])
        depth = max(min(self.candidates, len(self.bank)), 1)
        pools = self.bank.search(vectors, depth)[1]
        taken = [[] for _ in queries]
        for part in (0, 1):  # what the picture takes, the text does not take again
            at = [number for number, (kind, _) in enumerate(asked) if kind == part]
            rows = [asked[number][1] for number in at]
            given = [sources[row] for row in rows], [taken[row] for row in rows]
            found = self._take(vectors[at], pools[at], depth, *given)
            for row, documents in zip(rows, found):
                taken[row] += documents
        return [self._choose(documents, rng) for documents, rng in zip(taken, rngs)]

    def _take(
        self, queries: np.ndarray, pools: np.ndarray, depth: int, sources: list[Source], taken: list[list[Found]]
    ) -> list[list[Found]]:
        """For each query the first of its pool's `depth` best that may be taken; of more if they are too few."""
        found, size = [], max(1, VECTORS // depth)
        for start in range(0, len(pools), size):
            some = slice(start, start + size)
            found += self._accept(queries[some], pools[some, :depth], sources[some], taken[some])
        short = [at for at, documents in enumerate(found) if len(documents) < self.per_query]
        deepest = min(DEEPEST, len(self.bank))
        deeper = min(4 * depth, deepest)
        if short and deeper > depth:
            pools, sources, taken = pools[short], [sources[at] for at in short], [taken[at] for at in short]
            if deeper > pools.shape[1]:  # an exact search costs the same at any depth, so one does for all
                pools = self.bank.search(queries[short], deepest if self.bank.is_exact else deeper)[1]
            for at, documents in zip(short, self._take(queries[short], pools, deeper, sources, taken)):
                found[at] = documents
        return found

    def _accept(
        self, queries: np.ndarray, pools: np.ndarray, sources: list[Source], taken: list[list[Found]]
    ) -> list[list[Found]]:
        there = np.maximum(pools, 0)  # a compressed index may find fewer than it is asked for: the rest is -1
        vectors = self.bank.vectors(there.ravel()).reshape(*pools.shape, -1)
        scores = np.einsum("qkd,qd->qk", vectors, queries)  # the same in every batch, as those of a search are not
        allowed = (pools >= 0) & (scores <= self.limit)
        order = np.lexsort((pools, -scores, ~self.bank.multimodal[there]))
        accepted = []
        for at, ranked in enumerate(order):
            ranked = ranked[allowed[at, ranked]]
            candidates = (
                Found(row, score, _unit(vectors[at, place]))
                for place, row, score in zip(ranked, pools[at, ranked].tolist(), scores[at, ranked].tolist())
            )
            accepted.append(self._first(candidates, sources[at], taken[at]))
        return accepted

    def _first(self, candidates: Iterable[Found], source: Source, taken: list[Found]) -> list[Found]:
        """The first candidates that are no copy of the source, nor like what is taken."""
        accepted = []
        for found in candidates:
            if len(accepted) == self.per_query:
                break
            alike = any(found.vector @ other.vector > self.limit for other in taken + accepted)
            if not alike and not self.bank.is_copy(found.row, source.id, source.content):
                accepted.append(found)
        return accepted

    def _choose(self, taken: list[Found], rng: np.random.Generator) -> list[Found]:
        if self.training:
            taken = [taken[at] for at in rng.choice(len(taken), min(self.count, len(taken)), replace=False)]
        return sorted(taken, key=lambda found: (-found.score, found.row))[: self.count]

    def _embed(self, embed, values: list, rngs: list[np.random.Generator]) -> list[np.ndarray | None]:
        """Unit vectors of what is there, in training with query dropout, and `None` for what is not."""
        there = [at for at, value in enumerate(values) if value is not None]
        dropout = {"rngs": [rngs[at] for at in there], "dropout": self.query_dropout} if self.training else {}
        vectors = embed([values[at] for at in there], **dropout).cpu().numpy()
        embedded = dict(zip(there, vectors))
        return [embedded.get(at) for at in range(len(values))]

    def _fetch(self, selected: list[list[Found]]) -> list[list[dict]]:
        """The documents behind what is selected, all read at once."""
        rows = sorted({found.row for one in selected for found in one})
        documents = dict(zip(rows, self.bank.fetch(rows)))
        return [[documents[found.row] | {"score": found.score} for found in one] for one in selected]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.sqrt(vector @ vector), SMALLEST)


__all__ = ["RetrievalAugmenter"]
