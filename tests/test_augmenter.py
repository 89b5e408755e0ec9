"""The retrieval strategy against a transcription of its rules, and the same result however rows reach it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, draw
from datasets import Dataset, Features
from small_banks import DIMENSION, ENCODER, SOURCE, SeededEncoder, png

from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter, Source
from cm3leon_hf.retrieval.documents import RETRIEVED, content_key
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank

PAIRS = [(colour, shape) for colour in (*COLOURS, "black", "orange") for shape in SHAPES]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_bank(rng: np.random.Generator) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Documents in clusters, near-duplicates and copies among them, of every modality; and their text vectors."""
    count = int(rng.integers(1, 120))
    centres = rng.standard_normal((int(rng.integers(1, 12)), 1, DIMENSION))
    centres = np.concatenate([centres, centres + 0.5 * rng.standard_normal(centres.shape)], 1)  # text and picture
    noise = rng.choice([0.03, 0.3, 1.0], (count, 1, 1)) * rng.standard_normal((count, 2, DIMENSION))
    parts = unit(centres[rng.integers(len(centres), size=count)] + noise)
    documents, vectors = [], []
    for row, (text, image) in enumerate(parts):
        kind = rng.choice(["both", "both", "text", "image"])
        document = {"id": f"d{row}", "text": f"text {rng.integers(count)}", "codes": [int(rng.integers(count))]}
        documents.append({key: value for key, value in document.items() if kind == "both" or key in ("id", kind)})
        if kind == "image":
            documents[-1]["codes"] = document["codes"]
        vectors.append({"both": (text + image) / 2, "text": text, "image": image}[kind])
    return documents, np.stack(vectors), parts


def is_copy(document: dict, row: dict) -> bool:
    if document["id"] == row["id"]:
        return True
    if "codes" in document or "codes" in row:
        return document.get("codes") == row.get("codes")
    return document["text"] == row["text"]


def retrieve_by_query(query, documents, vectors, row, taken, pool_size) -> list[int]:
    """Two documents by one query, as the facts say it."""
    scores = [float(vector @ query) for vector in vectors]
    by_relevance = sorted(range(len(documents)), key=lambda at: -scores[at])
    while True:
        pool = by_relevance[:pool_size]
        multimodal = [at for at in pool if "text" in documents[at] and "codes" in documents[at]]
        own = []
        for at in multimodal + [at for at in pool if at not in multimodal]:
            too_similar = [other for other in taken + own if unit(vectors[at]) @ unit(vectors[other]) > 0.9]
            if scores[at] <= 0.9 and not too_similar and not is_copy(documents[at], row) and len(own) < 2:
                own.append(at)
        if len(own) == 2 or len(pool) == len(documents):
            return own
        pool_size *= 4


@pytest.mark.parametrize("seed", range(40))
def test_the_strategy_is_the_papers(seed):
    rng = np.random.default_rng(seed)
    documents, vectors, parts = random_bank(rng)
    bank = MemoryBank.from_vectors(documents, vectors, ENCODER)
    best = RetrievalAugmenter(bank, SeededEncoder(), training=False, count=4, candidates=int(rng.integers(1, 20)))
    drawn = replace(best, training=True, count=3)
    rows, queries = [], []
    for at in rng.integers(len(documents), size=6):  # half of them lie in the bank
        rows.append(documents[at] if rng.random() < 0.5 else {"id": "new", "text": "new", "codes": [9999]})
        text, image = unit(parts[at] + rng.choice([0.0, 0.2]) * rng.standard_normal((2, DIMENSION)))
        queries.append((image if "codes" in rows[-1] else None, text if "text" in rows[-1] else None))
    sources = [Source(row["id"], content_key(row.get("codes"), None, row.get("text"))) for row in rows]
    generators = [np.random.default_rng([seed, at]) for at in range(len(rows))]
    found, some = best.select(queries, sources, generators), drawn.select(queries, sources, generators)
    for row, pair, one, other in zip(rows, queries, found, some):
        taken, score = [], {}
        for query in pair:
            if query is not None:
                own = retrieve_by_query(query, documents, vectors, row, taken, best.candidates)
                score |= {at: float(vectors[at] @ query) for at in own}
                taken += own
        assert [item.row for item in one] == sorted(taken, key=lambda at: -score[at])
        assert [item.score for item in one] == pytest.approx([score[item.row] for item in one], abs=1e-5)
        assert {item.row for item in other} <= set(taken) and len(other) == min(3, len(taken))
        assert [item.score for item in other] == sorted((item.score for item in other), reverse=True)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [
        {"id": row, "text": f"a {' '.join(pair)}", "image": png(draw(*pair)), "codes": [row] * 4}
        for row, pair in enumerate(PAIRS)
    ]


@pytest.fixture(scope="module")
def source(rows) -> Dataset:
    return Dataset.from_list(rows, features=SOURCE)


@pytest.fixture(scope="module")
def augmenter(source, tmp_path_factory) -> RetrievalAugmenter:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    return RetrievalAugmenter(MemoryBank.build(source, SeededEncoder(), folder, shard_size=5), SeededEncoder())


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_a_row_keeps_its_columns_and_never_gets_itself(augmenter, rows):
    batch = columns([row | {"id": f"other {row['id']}"} for row in rows])
    for given in (columns(rows), batch):
        out = augmenter(given)
        assert {name: out[name] for name in given} == given and set(out) == {*given, "retrieved"}
        for row, retrieved in zip(rows, out["retrieved"]):
            assert len(retrieved) == 3 == len({one["id"] for one in retrieved})
            assert row["codes"] not in [one["codes"] for one in retrieved]
            for one in retrieved:
                assert one["codes"] == [int(one["id"])] * 4 and one["text"] == rows[int(one["id"])]["text"]
                assert set(one) == {"id", "text", "codes", "image", "licence", "score"}


def test_training_draws_three_of_four_and_every_three(augmenter, rows):
    four = replace(augmenter, count=4, query_dropout=0.0)
    drawn = {
        tuple(one["id"] for one in augmenter(columns(rows[:1]))["retrieved"][0])
        for augmenter in (replace(four, count=3, seed=seed) for seed in range(200))
    }
    assert len({frozenset(three) for three in drawn}) >= 4, "dropout of the test's encoder changes the four themselves"
    assert all(len(three) == 3 for three in drawn)


def test_only_training_drops_tokens_and_draws(augmenter, rows, monkeypatch):
    seen = []
    draw_vectors = SeededEncoder.draw
    monkeypatch.setattr(SeededEncoder, "draw", lambda *a: seen.append(a[2] is not None) or draw_vectors(*a))
    best = replace(augmenter, training=False, count=2)
    assert best(columns(rows)) == replace(best, seed=7)(columns(rows)) and not any(seen)
    assert augmenter(columns(rows)) != replace(augmenter, seed=7)(columns(rows)) and all(seen[4:])


def test_the_draws_depend_on_the_row_alone(augmenter, rows):
    whole = augmenter(columns(rows))["retrieved"]
    assert augmenter(columns(rows[::-1]))["retrieved"] == whole[::-1]
    assert [augmenter(columns([row]))["retrieved"][0] for row in rows] == whole
    assert pickle.loads(pickle.dumps(augmenter))(columns(rows))["retrieved"] == whole


def test_candidates_in_small_portions_give_the_same(augmenter, rows, monkeypatch):
    whole = augmenter(columns(rows))
    monkeypatch.setattr("cm3leon_hf.retrieval.augmenter.VECTORS", 1)
    assert augmenter(columns(rows)) == whole


def test_one_worker_or_eight_retrieve_the_same(augmenter, source):
    features = Features(source.features | {"retrieved": RETRIEVED})
    options = {"batched": True, "batch_size": 5, "features": features, "load_from_cache_file": False}
    one, eight = source.map(augmenter, **options), source.map(augmenter, num_proc=8, **options)
    assert one["retrieved"][:] == eight["retrieved"][:] and len(one["retrieved"][0]) == 3
    lazy = source.with_transform(augmenter)
    loader = torch.utils.data.DataLoader(lazy, batch_size=4, num_workers=2, collate_fn=lambda rows: rows)
    assert [row["retrieved"] for batch in loader for row in batch] == one["retrieved"][:]


def test_prompts_get_the_best(augmenter, source):
    prompts = ["a red circle", "something else"]
    queries = augmenter.encoder.embed_texts(prompts).numpy()
    scores, best = augmenter.bank.search(queries, 2)
    for count in (0, 1, 2):
        for found, score, row in zip(augmenter.for_prompts(prompts, count), scores, best):
            assert [one["id"] for one in found] == [str(source[int(at)]["id"]) for at in row[:count]]
            assert [one["score"] for one in found] == pytest.approx(score[:count].tolist(), abs=1e-5)
    assert augmenter.for_prompts([]) == []
    for wrong, count, message in (([" "], 2, "prompts that are not empty"), (prompts, 3, "a count from 0 to 2, got 3")):
        with pytest.raises(ValueError, match=message):
            augmenter.for_prompts(wrong, count)


def test_pictures_get_the_nearest_or_those_of_them_that_describe_them_best(augmenter, source, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.retrieval.augmenter.DESCRIBING", 4)
    pictures = [row["image"] for row in source.select(range(3))]
    queries = augmenter.encoder.embed_images(pictures).numpy()
    scores, best = augmenter.bank.search(queries, len(augmenter.bank))
    texts = augmenter.encoder.embed_texts(source["text"][:]).numpy()
    for by_text in (False, True):
        for number, found in enumerate(augmenter.for_pictures(pictures, 2, by_text)):
            near = [int(at) for at, score in zip(best[number], scores[number]) if score <= augmenter.limit][:4]
            if by_text:
                near.sort(key=lambda at: -texts[at] @ queries[number])
            assert [one["id"] for one in found] == [str(source[at]["id"]) for at in near[:2]] and len(found) == 2
        assert augmenter.for_pictures([], 1, by_text) == []
        with pytest.raises(ValueError, match="a count from 0 to 2, got 3"):
            augmenter.for_pictures(pictures, 3, by_text)


def test_documents_without_text_describe_nothing(augmenter):
    wordless, described = {"id": "a", "text": None}, {"id": "b", "text": "a red circle"}
    assert augmenter.by_text([draw("red", "circle")], [[wordless, described]]) == [[described, wordless]]
    assert augmenter.by_text([draw("red", "circle")], [[wordless]]) == [[wordless]]


def test_rows_with_one_part_have_one_query(augmenter, rows):
    four = replace(augmenter, training=False, count=4)
    both, text, image = four(
        {"text": [rows[0]["text"], rows[0]["text"], None], "image": [rows[0]["image"], None] + [rows[0]["image"]]}
    )["retrieved"]
    assert (len(both), len(text), len(image)) == (4, 2, 2)
    with pytest.raises(ValueError, match="expected an image file"):
        four({"image": [b"no picture"]})
    with pytest.raises(ValueError, match="got an empty text in row 7; drop it"):
        four({"id": [6, 7], "text": ["a", " "]})


def test_small_and_wrong_banks(augmenter):
    encoder = SeededEncoder()
    one = MemoryBank.from_vectors([{"id": "a", "text": "a"}], encoder.encode(["a"], [None]), ENCODER)
    alone = replace(augmenter, bank=one)
    assert alone({"text": ["a"]})["retrieved"] == [[]], "its own copy"
    assert [[d["id"] for d in found] for found in alone({"text": ["b"]})["retrieved"]] == [["a"]]
    empty = MemoryBank.from_vectors([], np.zeros((0, DIMENSION)), ENCODER)
    with pytest.raises(ValueError, match="got an empty one"):
        replace(augmenter, bank=empty)({"text": ["b"]})
    with pytest.raises(ValueError, match="the bank's encoder test@0, got other@1"):
        replace(augmenter, encoder=SeededEncoder("other@1"))
    with pytest.raises(ValueError, match="a count from 0 to 4, got 5"):
        replace(augmenter, count=5)


def test_a_compressed_bank_gives_what_it_finds(augmenter):
    vectors = unit(np.random.default_rng(0).standard_normal((200, DIMENSION)))
    documents = [{"id": f"{row}", "text": f"text {row}"} for row in range(200)]
    bank = MemoryBank.from_vectors(documents, vectors, ENCODER, factory="IVF8,Flat")
    found = replace(augmenter, bank=bank, candidates=200, count=2)({"text": ["a", "b", "c"]})["retrieved"]
    assert [len(one) for one in found] == [2] * 3


def test_with_a_clip(source, small_clip, tmp_path):
    encoder = CLIPEncoder(small_clip, None, device="cpu", batch_size=4)
    bank = MemoryBank.build(source, encoder, tmp_path / "bank", shard_size=8)
    augmenter = RetrievalAugmenter(bank, encoder, max_score=2.0)  # random weights find everything alike
    retrieved = augmenter(source[:])["retrieved"]
    assert all(len(one) == 3 and str(row) not in [d["id"] for d in one] for row, one in enumerate(retrieved))
    assert [len(one) for one in augmenter.for_prompts(["a red circle"])] == [2]
