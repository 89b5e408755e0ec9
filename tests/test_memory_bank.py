"""The memory bank against brute force; saved, merged, killed while it is built, and handed bad input."""

import io
import json
import os
import pickle
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, draw
from datasets import Dataset, Features, Image, List, Value

from cm3leon_hf.retrieval import bank_files, building, indexes, memory_bank
from cm3leon_hf.retrieval.building import write_shards
from cm3leon_hf.retrieval.documents import content_key, encode_rows, make_documents
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.indexes import choose_factory
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


@pytest.fixture(scope="module")
def source() -> Dataset:
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
    monkeypatch.setattr(memory_bank, "CHUNK", 100)
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


@pytest.mark.parametrize("damage, message", [("cut", "bytes in .*index.ivfdata"), ("unlink", "expected index.ivfdata")])
def test_damage_of_lists_is_named(damage, message, tmp_path):
    MemoryBank.merge([bank_of(400)], tmp_path / "bank", COMPRESSED)
    {"cut": cut, "unlink": Path.unlink}[damage](tmp_path / "bank" / "index.ivfdata")
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path / "bank")


@pytest.mark.parametrize(
    "count, factory",
    [
        (0, "Flat"),
        (999_999, "Flat"),
        (1_000_000, "RR448,IVF4096,RaBitQ"),
        (10_000_000, "RR448,IVF16384,RaBitQ"),
        (340_000_000, "RR448,IVF65536_HNSW32,RaBitQ"),
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


def test_built_from_a_source(source, tmp_path):
    encoder = SeededEncoder()
    bank = MemoryBank.build(source, encoder, tmp_path / "bank", shard_size=4)
    assert [row["id"] for row in bank.documents] == ["0", "1", "2", "5", "6", "7", "8", "9"]
    assert bank.documents[1]["text"] == "a red square" and bank.documents[1]["codes"] == [1] * 4
    assert bank.multimodal.tolist() == [True] * 6 + [False] * 2
    np.testing.assert_array_equal(
        bank.vectors(range(8))[[0, 6, 7]],
        encoder.encode(["a red circle", "words alone", None], [draw("red", "circle"), None, draw("black", "square")]),
    )
    assert [row["id"] for row in bank.skipped] == ["3", "4"]
    assert all("expected" in row["reason"] for row in bank.skipped)
    assert json.loads((tmp_path / "bank/manifest.json").read_text())["skipped"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_streams_and_several_processes_build_the_same(source, tmp_path):
    bank = MemoryBank.build(source, SeededEncoder(), tmp_path / "bank", shard_size=2)
    stream = source.to_iterable_dataset()
    assert same(bank, MemoryBank.build(stream, SeededEncoder(), tmp_path / "stream", shard_size=2))
    for process in (2, 0, 1):
        write_shards(source, SeededEncoder(), tmp_path / "spread.shards", 2, process, processes=3)
    assert len(list((tmp_path / "spread.shards").glob("shard-*"))) == 5
    assert same(bank, MemoryBank.build(source, SeededEncoder(), tmp_path / "spread", shard_size=2))


def killed_build(rng: np.random.Generator, *arguments) -> int:
    """Builds in a process of its own, which is killed at one of its steps; the steps are writes and renames."""
    left = int(rng.integers(70))
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def counting(step):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return counted

    try:
        for owner, name in (
            (building, "encode_rows"),
            (memory_bank, "write_index"),
            (memory_bank, "write_documents"),
            (bank_files, "checksum"),
            (Path, "rename"),
            (Path, "write_text"),
            (Path, "replace"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            setattr(owner, name, counting(getattr(owner, name)))
        MemoryBank.build(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_killed_build_goes_on_to_the_same_bank(source, tmp_path):
    unbroken = MemoryBank.build(source, SeededEncoder(), tmp_path / "unbroken", shard_size=3)
    manifest = (tmp_path / "unbroken/manifest.json").read_text()
    kills = 0
    for seed in range(20):
        rng, folder = np.random.default_rng(seed), tmp_path / f"bank-{seed}"
        for _ in range(1 + seed % 2):
            code = killed_build(rng, source, SeededEncoder(), folder, 3)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        bank = MemoryBank.build(source, SeededEncoder(), folder, 3)
        assert same(unbroken, bank) and (folder / "manifest.json").read_text() == manifest, f"seed {seed}"
        assert not list(tmp_path.glob(f"*bank-{seed}?*")), "nothing is left over"
    assert kills >= 20


def test_a_finished_shard_is_not_encoded_again(source, tmp_path, monkeypatch):
    write_shards(source, SeededEncoder(), tmp_path / "bank.shards", 4)
    shutil.rmtree(tmp_path / "bank.shards/shard-000001")
    seen = []
    monkeypatch.setattr(building, "encode_rows", lambda *a: seen.append(1) or encode_rows(*a))
    MemoryBank.build(source, SeededEncoder(), tmp_path / "bank", 4)
    assert len(seen) == 1


def test_shards_made_otherwise_are_refused(source, tmp_path):
    write_shards(source, SeededEncoder(), tmp_path / "bank.shards", 4)
    for other in (
        (source, SeededEncoder(), 3),
        (source, SeededEncoder("other@1"), 4),
        (source.select([0]), SeededEncoder(), 4),
    ):
        with pytest.raises(ValueError, match="expected shards of"):
            MemoryBank.build(*other[:2], tmp_path / "bank", other[2])


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    bank_of(5).save(tmp_path / "bank")
    monkeypatch.setattr(memory_bank, "write_documents", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank_of(6).save(tmp_path / "bank")
    assert same(bank_of(5), MemoryBank.load(tmp_path / "bank")) and len(list(tmp_path.iterdir())) == 1


def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    for place in ("thesis", "thesis/chapter.tex"):
        with pytest.raises(ValueError, match="choose another folder"):
            bank_of(5).save(tmp_path / place)
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"


def test_wrong_queries_are_refused():
    bank = bank_of(5)
    for queries, k, message in (
        (vectors(2), 6, "k from 1 to the bank's 5 documents, got 6"),
        (vectors(2), 0, "got 0"),
        (vectors(2)[:, 1:], 1, r"shape \(n, 16\), got \(2, 15\)"),
        (vectors(1)[0], 1, r"shape \(n, 16\)"),
        (np.where(np.eye(2, DIMENSION), np.nan, 1), 1, "NaN or infinity in row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.search(queries, k)
    with pytest.raises(ValueError, match="got an empty one"):
        bank_of(0).search(vectors(1), 1)


@pytest.mark.parametrize(
    "documents, stored, message",
    [
        (texts(2), vectors(3), "got 3 for 2"),
        (texts(2), vectors(2) * np.nan, "NaN or infinity in row 0"),
        (texts(1, 7) + texts(1, 7), vectors(2), r"'t7'.* more than once"),
        ([{"id": "a", "text": " "}], vectors(1), "empty caption in row 'a'"),
        ([{"text": "b"}], vectors(1), "an id in every row"),
        ([{"id": "a"}], vectors(1), "got neither in row 'a'"),
        ([{"id": "a", "codes": [-1]}], vectors(1), "codes from 0 to 65535"),
        ([{"id": "a", "codes": []}], vectors(1), "codes from 0 to 65535"),
        ([{"id": "a", "image": draw("red", "circle")}], vectors(1), "got pixels; tokenize it first"),
        ([{"id": "a", "image": "nowhere.png"}], vectors(1), "which is no file"),
    ],
)
def test_wrong_documents_are_refused(documents, stored, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank.from_vectors(documents, stored, ENCODER)
    if documents[0].get("id") == "t7":
        bank = bank_of(8)
        with pytest.raises(ValueError, match=message):
            bank.add(documents[:1], stored[:1])
        assert len(bank) == 8


def test_wrong_sources_and_merges_are_refused(source, tmp_path):
    def build(rows: Dataset):
        shutil.rmtree(tmp_path / "bank.shards", ignore_errors=True)
        MemoryBank.build(rows, SeededEncoder(), tmp_path / "bank", 1)

    for rows, message in (
        (source.select([3, 4]), "expected banks with documents, got none"),
        (source.select([]), "expected banks with documents, got none"),
        (source.select([0, 1, 0]), "'0'.* more than once"),
        (source.remove_columns("image"), "codes alone"),
        (source.remove_columns("codes"), "got pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            build(rows)
    other = MemoryBank.from_vectors(texts(5, 5), vectors(5), "other@1")
    with pytest.raises(ValueError, match="one encoder and dimension"):
        MemoryBank.merge([bank_of(5), other], tmp_path / "merged")
    with pytest.raises(ValueError, match="factory string"):
        bank_of(5, factory="Fl4t")
    assert not (tmp_path / "merged").exists()


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["index.faiss", "documents-00000.arrow", "vectors.npy", "skipped.json"])
def test_damage_is_named(name, tmp_path):
    for damage, message in (
        (cut, f"bytes in .*{name}"),
        (flip, f"checksum.*{name}"),
        (Path.unlink, f"expected {name}"),
    ):
        folder = tmp_path / damage.__name__
        bank_of(100, factory=COMPRESSED, skipped=[{"id": "s", "reason": "it is broken"}]).save(folder)
        damage(folder / name)
        with pytest.raises(ValueError, match=message):
            MemoryBank.load(folder, verify=True)
    for path in (tmp_path / "flip", tmp_path / "cut"):  # what a manifest of a damaged file would let through
        (path / name).write_bytes(b"x" * 99)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        if name != "skipped.json":
            with pytest.raises(ValueError, match=f"in .*{name}, could not read"):
                MemoryBank.load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 6}, "expected count 6"),
        ({"dimension": 15}, "expected dimension 15"),
        ({"metric": "l2"}, "metric inner_product.*got l2"),
        ({"encoder": "other@1"}, "expected encoder test@0 of the bank, got other@1"),
    ],
)
def test_mismatches_are_named(change, message, tmp_path):
    bank_of(5).save(tmp_path / "bank")
    path = tmp_path / "bank/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path / "bank", ENCODER)


def test_a_folder_without_a_manifest_is_no_bank(tmp_path):
    with pytest.raises(ValueError, match="found no manifest.json"):
        MemoryBank.load(tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json"):
            MemoryBank.load(tmp_path)


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
