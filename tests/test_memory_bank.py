"""The memory bank against brute force: searched, saved, loaded, merged, pickled."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import draw
from small_banks import COMPRESSED, DIMENSION, ENCODER, bank_of, same, texts, vectors

from cm3leon_hf.retrieval import indexes, merging
from cm3leon_hf.retrieval.documents import content_key, make_documents
from cm3leon_hf.retrieval.indexes import choose_factory
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@pytest.mark.parametrize("seed", range(20))
def test_search_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    bank, k = bank_of(count, seed), int(rng.integers(1, count + 1))
    queries = vectors(int(rng.integers(1, 30)), seed + 100)
    scores, rows = bank.search(queries, k)
    products = queries @ vectors(count, seed).T
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :k], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(products, rows, 1), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(bank.vectors(rows[0]), vectors(count, seed)[rows[0]])


def test_a_compressed_index_proposes_and_exact_vectors_decide(tmp_path):
    stored, queries = vectors(400), vectors(20, 1)
    bank = MemoryBank.from_vectors(texts(400), stored, ENCODER, factory=COMPRESSED)
    scores, rows = bank.search(queries, 10)
    found = rows >= 0
    np.testing.assert_allclose(
        scores[found], np.einsum("qd,qkd->qk", queries, stored[rows])[found], rtol=1e-5, atol=1e-5
    )
    assert (np.diff(scores, axis=1) <= 0).all() and np.isinf(scores[~found]).all()
    np.testing.assert_array_equal(bank.vectors(rows[0][found[0]]), stored[rows[0][found[0]]])
    bank.save(tmp_path / "bank")
    again = MemoryBank.load(tmp_path / "bank", verify=True)
    assert same(bank, again) and (again.search(queries, 10)[1] == rows).all()
    merged = MemoryBank.merge([bank_of(400)], tmp_path / "merged", COMPRESSED)
    assert same(merged, bank)
    merged.add([{"id": "new", "text": "new"}], 9 * queries[:1])
    assert merged.search(9 * queries[:1], 400)[1].max() == 400


@pytest.mark.parametrize("factory", ["IVF8,SQ4", "PCA8,IVF8_HNSW4,SQ4", "RR16,IVF8,RaBitQ", "IVF8,PQ4x4fs"])
@pytest.mark.parametrize("part_vectors", [1, 300, 10_000])
def test_merged_on_disk_it_is_what_memory_would_give(factory, part_vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "CHUNK", 100)
    monkeypatch.setattr(indexes, "PART_VECTORS", part_vectors)
    stored, queries = vectors(1000), vectors(20, 1)
    whole = MemoryBank.from_vectors(texts(1000), stored, ENCODER, factory=factory)
    cuts = [0, 500, 507, 1000]
    shards = [
        MemoryBank.from_vectors(texts(stop - start, start), stored[start:stop], ENCODER)
        for start, stop in zip(cuts, cuts[1:])
    ]
    merged = MemoryBank.merge(shards, tmp_path / "merged", factory)
    assert same(whole, merged) and (merged.search(queries, 10)[1] == whole.search(queries, 10)[1]).all()
    on_disk = not factory.endswith("fs")  # packed lists are merged in memory
    files = {"manifest.json", "skipped.json", "vectors.npy", "index.faiss", *(["index.ivfdata"] if on_disk else [])}
    assert {path.name for path in (tmp_path / "merged").iterdir() if path.suffix != ".arrow"} == files

    merged.save(tmp_path / "copy")
    before = (tmp_path / "copy" / "index.faiss").read_bytes()
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "copy").rename(tmp_path / "moved")
    moved = MemoryBank.load(tmp_path / "moved", verify=True)
    assert same(whole, moved) and same(whole, pickle.loads(pickle.dumps(moved)))
    moved.add(texts(5, 1000), vectors(5, 2))
    whole.add(texts(5, 1000), vectors(5, 2))
    assert same(whole, moved) and len(MemoryBank.load(tmp_path / "moved", verify=True)) == 1000
    moved.save(tmp_path / "moved")
    assert same(whole, MemoryBank.load(tmp_path / "moved", verify=True))
    assert before != (tmp_path / "moved" / "index.faiss").read_bytes()


@pytest.mark.parametrize(
    "count, factory",
    [
        (0, "Flat"),
        (999_999, "Flat"),
        (1_000_000, "RR328,IVF4096,RaBitQ"),
        (10_000_000, "RR328,IVF16384,RaBitQ"),
        (340_000_000, "RR328,IVF65536_HNSW32,RaBitQ"),
    ],
)
def test_the_size_chooses_the_index(count, factory):
    assert choose_factory(count, 512) == factory


@pytest.mark.parametrize("folder", ["bank", "deep/er/bank"])
def test_saved_and_loaded_it_is_the_same(folder, tmp_path):
    bank = bank_of(30)
    bank.save(tmp_path / folder)
    assert same(bank, MemoryBank.load(tmp_path / folder, ENCODER, verify=True))
    bank.add(texts(3, start=30), vectors(3, 1))
    bank.save(tmp_path / folder)
    again = MemoryBank.load(tmp_path / folder)
    assert same(bank, again) and len(again) == 33
    again.save(tmp_path / folder)  # over what it is mapped from
    assert same(again, MemoryBank.load(tmp_path / folder, verify=True))
    assert {path.name for path in (tmp_path / folder).parent.iterdir()} == {"bank"}


def test_added_and_merged_it_is_what_one_bank_would_be(tmp_path):
    whole = bank_of(30)
    grown = MemoryBank.from_vectors(texts(10), vectors(30)[:10], ENCODER)
    grown.add(texts(5, start=10), vectors(30)[10:15])
    grown.save(tmp_path / "grown")
    other = MemoryBank.from_vectors(texts(15, start=15), vectors(30)[15:], ENCODER)
    assert same(whole, MemoryBank.merge([MemoryBank.load(tmp_path / "grown"), other], tmp_path / "merged"))
    loaded = MemoryBank.load(tmp_path / "grown")
    loaded.add(texts(15, start=15), vectors(30)[15:])
    assert same(whole, loaded) and len(MemoryBank.load(tmp_path / "grown")) == 15


def test_a_saved_bank_pickles_as_its_folder(tmp_path):
    bank = bank_of(30)
    with pytest.raises(ValueError, match="save it first"):
        pickle.dumps(bank)
    bank.save(tmp_path / "bank")
    pickled = pickle.dumps(bank)
    assert len(pickled) < 1000 and same(bank, pickle.loads(pickled))
    bank_of(30, seed=1).save(tmp_path / "bank")
    with pytest.raises(ValueError, match="got another"):
        pickle.loads(pickled)


def test_a_search_does_without_torch(tmp_path):
    """A process that only searches holds the libraries and the index, and torch alone would be twice that."""
    bank_of(5).save(tmp_path / "bank")
    code = f"""
import sys, numpy
from cm3leon_hf.retrieval.memory_bank import MemoryBank
MemoryBank.load({str(tmp_path / "bank")!r}).search(numpy.ones((1, {DIMENSION})), 2)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_copies_are_known_by_picture_and_else_by_text(tmp_path):
    red, blue = draw("red", "circle"), draw("blue", "circle")
    red.save(tmp_path / "red.png")
    rows = [
        {"id": "codes", "text": "x", "codes": [1, 2], "licence": "CC0"},
        {"id": "path", "text": "x", "image": str(tmp_path / "red.png")},
        {"id": "text", "text": "x"},
    ]
    bank = MemoryBank.from_vectors(make_documents(rows), vectors(3), ENCODER)
    keys = [content_key([1, 2], blue, "y"), content_key(None, red, "y"), content_key(None, None, "x")]
    assert [[bank.is_copy(row, "", key) for row in range(3)] for key in keys] == np.eye(3, dtype=bool).tolist()
    assert bank.is_copy(1, "path", 0) and not bank.is_copy(1, "codes", content_key(None, blue, "x"))
    assert bank.fetch([1, 0])[1] == rows[0] | {"image": None}
