"""Building memory banks: from tables and streams, spread over processes, and killed on the way."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from datasets import Dataset
from small_banks import SeededEncoder, broken_source, same

from cm3leon_hf.retrieval import bank_files, building
from cm3leon_hf.retrieval.building import write_shards
from cm3leon_hf.retrieval.documents import encode_rows
from cm3leon_hf.retrieval.memory_bank import MemoryBank

STEPS = 70  # of an unbroken build of the source; one or two more than there are


@pytest.fixture(scope="module")
def source() -> Dataset:
    return broken_source()


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


def killed_build(left: int, *arguments) -> int:
    """Builds in a process of its own, which is killed after so many steps, the file that it writes cut in half."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def counting(step, written: int | None):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                if written is not None:
                    step(*args, **kwargs)
                    os.truncate(args[written], os.path.getsize(args[written]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return counted

    try:
        for owner, name, written in (  # and which of their arguments is the file
            (building, "encode_rows", None),
            (bank_files, "write_index", 1),
            (bank_files, "write_documents", 1),
            (bank_files, "checksum", None),
            (Path, "rename", None),
            (Path, "write_text", 0),
            (Path, "replace", None),
            (os, "unlink", None),
            (os, "rmdir", None),
        ):
            setattr(owner, name, counting(getattr(owner, name), written))
        MemoryBank.build(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_killed_build_goes_on_to_the_same_bank(source, tmp_path, monkeypatch):
    unbroken = MemoryBank.build(source, SeededEncoder(), tmp_path / "unbroken", shard_size=3)
    manifest = (tmp_path / "unbroken/manifest.json").read_text()
    encoded, kills, kept, moments = [], 0, set(), iter(np.random.default_rng(0).permutation(STEPS).tolist())
    monkeypatch.setattr(building, "encode_rows", lambda *a: encoded.append(1) or encode_rows(*a))
    for number in range(20):
        folder = tmp_path / f"bank-{number}"
        for _ in range(1 + number % 2):
            code = killed_build(next(moments), source, SeededEncoder(), folder, 3)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        there = len(list(tmp_path.glob(f"bank-{number}.shards/shard-*/manifest.json")))
        encoded.clear()
        bank = MemoryBank.build(source, SeededEncoder(), folder, 3)
        assert len(encoded) == 4 - there, "shards that are there stay"
        assert same(unbroken, bank) and (folder / "manifest.json").read_text() == manifest, f"bank {number}"
        assert not list(tmp_path.glob(f"*bank-{number}?*")), "nothing is left over"
        kept.add(there)
    assert kills >= 20 and kept == {0, 1, 2, 3, 4}, "killed everywhere"


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
