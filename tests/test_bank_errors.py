"""Memory banks and bad input: queries, documents, sources, damaged files, and what else lies where a bank is to go."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from datasets import Dataset
from small_banks import COMPRESSED, DIMENSION, ENCODER, SeededEncoder, bank_of, broken_source, same, texts, vectors

from cm3leon_hf.retrieval import bank_files
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@pytest.fixture(scope="module")
def source() -> Dataset:
    return broken_source()


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


def test_vectors_of_another_width_are_refused():
    bank = bank_of(8)
    with pytest.raises(ValueError, match=r"shape \(n, 16\), got \(1, 15\)"):
        bank.add(texts(1, 8), vectors(1)[:, 1:])
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


@pytest.mark.parametrize("damage, message", [("cut", "bytes in .*index.ivfdata"), ("unlink", "expected index.ivfdata")])
def test_damage_of_lists_is_named(damage, message, tmp_path):
    MemoryBank.merge([bank_of(400)], tmp_path / "bank", COMPRESSED)
    {"cut": cut, "unlink": Path.unlink}[damage](tmp_path / "bank" / "index.ivfdata")
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path / "bank")


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


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    bank_of(5).save(tmp_path / "bank")
    monkeypatch.setattr(bank_files, "write_documents", lambda *a: 1 / 0)
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
