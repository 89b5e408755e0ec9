"""The benchmark of retrieval on a few hundred vectors."""

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, load_recipe
from small_banks import SeededEncoder
from small_emoji import HELD_OUT_PAIRS, emoji_config, emoji_rows

from cm3leon_hf.retrieval.memory_bank import MemoryBank


@contextmanager
def here(*_, **options):
    """In place of a pool of processes: calls run in this one."""
    yield SimpleNamespace(apply=lambda function, arguments: function(*arguments))


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "recipes" / "benchmark"))
        yield load_recipe("benchmark/retrieval.py")


def test_it_measures_and_prints_a_json_line(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=here))
    sizes = {"count": 600, "dimension": 32, "queries": 20, "repeats": 1, "factories": ["IVF{lists},SQ8"]}
    benchmark.main(benchmark.RetrievalArguments(out=str(tmp_path), autofaiss="no-such-command", **sizes))
    output = capsys.readouterr().out
    line, record = json.loads(output.splitlines()[-1]), json.loads((tmp_path / "retrieval.json").read_text())
    wanted = {"flat_over_faiss", "augmenter_over_search", "recall_at_10", "bytes_per_vector", "load_seconds"}
    assert wanted <= set(line) and "| Flat |" in output
    assert re.search("autofaiss: not measured .*no-such-command", output)
    assert list(record["rows"]) == ["Flat", "RR32,IVF15,RaBitQ", "IVF15,SQ8"]
    assert record["rows"]["IVF15,SQ8"]["recall"] > 0.2 and line["recall_at_10"] > 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["retrieval.json", "retrieval.png"]


def test_vectors_are_as_a_clip_makes_them(benchmark, tmp_path):
    benchmark.write_vectors(tmp_path, 500, 256, 200)
    vectors, queries = np.load(tmp_path / "vectors" / "vectors.npy"), np.load(tmp_path / "queries.npy")
    texts, pictures = queries[::2], queries[1::2]
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(0.83, abs=0.05)
    assert (texts * pictures).sum(1).mean() == pytest.approx(0.38, abs=0.1)
    scores = queries @ vectors.T
    assert 0.5 < np.median(scores.max(1)) < 0.9, "documents are no copies of the queries"


def test_the_fastest_round_counts_and_calls_take_turns(benchmark, monkeypatch):
    order, clock = [], iter(range(1000))
    measures = load_recipe("benchmark/retrieval_measures.py")
    monkeypatch.setattr(measures.time, "perf_counter", lambda: next(clock))
    assert measures.fastest(2, lambda: order.append("a"), lambda: order.append("b")) == [1, 1]
    assert "".join(order) == "abbaab"


def test_hits_are_documents_of_the_same_concept(benchmark, tmp_path, monkeypatch):
    """To this encoder a thing looks the same in all styles, and captions have nothing in common."""
    emoji_config(tmp_path, "")
    rows, encoder = emoji_rows()["train"], SeededEncoder()
    documents = [{"id": row["source"], "text": row["captions"][0], "codes": row["codes"]} for row in rows]
    vectors = encoder.embed_images([row["image"] for row in rows]).numpy()
    bank = MemoryBank.from_vectors(documents, vectors, encoder.name)
    bank.max_score = 2.0  # what looks the same is no copy here
    measures = load_recipe("benchmark/retrieval_measures.py")
    monkeypatch.setattr(measures, "CLIPEncoder", lambda model: encoder)
    monkeypatch.setattr(measures.MemoryBank, "load", lambda *_: bank)
    args = measures.RetrievalArguments(bank="bank", clip_model="clip", dataset=str(tmp_path / "emoji"))
    found = measures.heldout_hit_rate(args)
    assert found["heldout_picture_hit_rate"] == 1 and found["heldout_hit_rate"] < 1
    assert found["heldout_prompts"] == len(HELD_OUT_PAIRS)
