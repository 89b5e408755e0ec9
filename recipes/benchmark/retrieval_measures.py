"""What the benchmark of retrieval measures: the bank beside raw FAISS and autofaiss, the augmenter, loading, hits."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from retrieval_synthetic import ENCODER, SHARD

from cm3leon_hf.images import read_image
from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.bank_files import INDEX
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.indexes import FLAT
from cm3leon_hf.retrieval.memory_bank import REFINE, MemoryBank

K = 10  # documents a query in the table
BATCH = 256  # rows that the augmenter takes at a time, with two queries each
FACTORIES = (
    "IVF{lists},RaBitQ",
    "RR448,IVF{lists},RaBitQ",
    "RR256,IVF{lists},RaBitQ",
    "RR96,IVF{lists},SQ4",
)  # all train in a minute
LOAD = """
import json, sys, time, psutil
from cm3leon_hf.retrieval.memory_bank import MemoryBank
process = psutil.Process()
before, start = process.memory_info().rss, time.perf_counter()
bank = MemoryBank.load(sys.argv[1])
seconds, after = time.perf_counter() - start, process.memory_info().rss
print(json.dumps({"load_seconds": seconds, "resident_mb": after / 1e6, "resident_of_bank_mb": (after - before) / 1e6}))
"""


@dataclass
class RetrievalArguments:
    out: str = field(default="runs/benchmark", metadata={"help": "Folder for the table and the plot."})
    count: int = field(default=1_000_000, metadata={"help": "Vectors; fewer to try the script."})
    dimension: int = field(default=512, metadata={"help": "Their width."})
    queries: int = field(default=1000, metadata={"help": "Queries that recall is measured on."})
    factories: list[str] = field(
        default_factory=lambda: list(FACTORIES),
        metadata={"help": "FAISS's names of compressed indexes beside the bank's own choice; {lists} is filled in."},
    )
    repeats: int = field(default=5, metadata={"help": "Runs of what is timed; the fastest counts."})
    autofaiss: str = field(default="autofaiss", metadata={"help": "Command of autofaiss; left out if there is none."})
    bank: str = field(default="", metadata={"help": "Folder of a bank to measure heldout_hit_rate on."})
    clip_model: str = field(default="", metadata={"help": "CLIP that made its vectors, such as local-dir:FOLDER."})
    dataset: str = field(default="", metadata={"help": "Its data set, with the columns captions, concept and style."})
    split: str = field(default="heldout_pairs", metadata={"help": "Held-out split that the prompts are from."})
    id_column: str = field(default="source", metadata={"help": "Column of the data set with the documents' ids."})


class NumberEncoder(CLIPEncoder):
    """In place of CLIP, so that what it costs is not measured: row numbers in texts and in pixels to vectors."""

    def __init__(self, vectors: np.ndarray):
        self.vectors, self.name = torch.from_numpy(vectors), ENCODER

    def embed_texts(self, texts, rngs=None, dropout=0.2):
        return self.vectors[[int(text) for text in texts]]

    def embed_images(self, images, rngs=None, dropout=0.2):
        return self.vectors[[int.from_bytes(image.tobytes()[:3], "big") for image in images]]


def fastest(repeats: int, *calls) -> list[float]:
    """
    Seconds of each call, the fastest of several rounds behind one that warms the caches.

    In a round the calls take turns, every other round backwards, so that other work on the machine, and what a call
    leaves in the caches, meets all of them.
    """
    seconds = [[] for _ in calls]
    for turn in range(repeats + 1):
        for number in range(len(calls))[:: 1 - 2 * (turn % 2)]:
            start = time.perf_counter()
            calls[number]()
            seconds[number].append(time.perf_counter() - start)
    return [min(times[1:]) for times in seconds]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the true rows that are found, `(queries, k)` both."""
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found.tolist(), truth)]))


def built(folder: Path, name: str, factory: str) -> tuple[MemoryBank, float]:
    """A bank of all shards, and the seconds that merging them took."""
    shards = [MemoryBank.load(path) for path in sorted((folder / "shards").iterdir())]
    start = time.perf_counter()
    bank = MemoryBank.merge(shards, folder / name, factory)
    return bank, time.perf_counter() - start


def augmented(bank: MemoryBank, queries: np.ndarray, repeats: int) -> dict:
    """The augmenter in training beside the bank's search and FAISS's own for the same queries."""
    augmenter = RetrievalAugmenter(bank, NumberEncoder(queries))
    numbers = range(0, 2 * BATCH, 2)  # of texts; the pictures' are the odd ones
    pictures = [Image.new("RGB", (8, 8), tuple((number + 1).to_bytes(3, "big"))) for number in numbers]
    rows = {"id": [f"row {number}" for number in numbers], "text": [str(number) for number in numbers]}
    rows["image"] = pictures
    asked, depth = queries[: 2 * BATCH], min(augmenter.candidates, len(bank))
    whole, search, raw = fastest(
        repeats, lambda: augmenter(rows), lambda: bank.search(asked, depth), lambda: bank.index.search(asked, depth)
    )
    milliseconds = 1e3 * (whole - search) / BATCH
    return {"over_search": whole / search, "over_raw": whole / raw, "overhead_ms_per_row": milliseconds}


def measure_flat(folder: Path, args: RetrievalArguments) -> dict:
    """The exact bank beside `faiss.IndexFlatIP`, whose answers are the truth for all other rows."""
    bank, seconds = built(folder, "flat", FLAT)
    vectors, queries = np.load(folder / "vectors" / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    raw = faiss.IndexFlatIP(args.dimension)
    for start in range(0, len(vectors), SHARD):
        raw.add(np.ascontiguousarray(vectors[start : start + SHARD]))
    np.save(folder / "truth.npy", raw.search(queries[: args.queries], K)[1])
    asked = queries[: 2 * BATCH]
    ours, theirs = fastest(args.repeats, lambda: bank.search(asked, K), lambda: raw.search(asked, K))
    return {
        "build_seconds": seconds,
        "bytes_per_vector": (folder / "flat" / INDEX).stat().st_size / args.count,
        "recall": 1.0,
        "recall_without_refining": 1.0,
        "queries_per_second": len(asked) / ours,
        "raw_queries_per_second": len(asked) / theirs,
        "bank_over_raw": ours / theirs,
        "augmenter": augmented(bank, queries, args.repeats),
    }


def measure_compressed(factory: str, folder: Path, args: RetrievalArguments) -> dict:
    """A compressed bank: what it costs, and what it finds with and without exact vectors having the last word."""
    bank, seconds = built(folder, "compressed", factory)
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    asked, deep = queries[: args.queries], min(len(bank), REFINE * K)
    ours, theirs = fastest(args.repeats, lambda: bank.search(asked, K), lambda: bank.index.search(asked, deep))
    size = sum(path.stat().st_size for path in (folder / "compressed").glob(f"{Path(INDEX).stem}.*"))
    return {
        "build_seconds": seconds,
        "bytes_per_vector": size / args.count,
        "code_bytes": faiss.extract_index_ivf(bank.index).code_size,
        "recall": recall(bank.search(asked, K)[1], truth),
        "recall_without_refining": recall(bank.index.search(asked, K)[1], truth),
        "queries_per_second": len(asked) / ours,
        "raw_queries_per_second": len(asked) / theirs,
        "bank_over_raw": ours / theirs,
        "augmenter": augmented(bank, queries, args.repeats),
    }


def measure_load(folder: Path) -> dict:
    """Seconds to load a bank, and resident memory before the first query, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    return next(json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))


def measure_autofaiss(folder: Path, args: RetrievalArguments, budget: int) -> dict:
    """The index that autofaiss chooses within as many bytes, searched as FAISS does it."""
    start = time.perf_counter()
    subprocess.run(
        [
            *(args.autofaiss, "build_index", f"--embeddings={folder / 'vectors'}", "--metric_type=ip"),
            *(f"--index_path={folder / 'auto.index'}", f"--index_infos_path={folder / 'auto.json'}"),
            *(f"--max_index_memory_usage={budget / 1e6:.0f}MB", "--current_memory_available=8GB"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    index = faiss.read_index(str(folder / "auto.index"))
    vectors = np.load(folder / "vectors" / "vectors.npy", mmap_mode="r")
    queries, truth = np.load(folder / "queries.npy")[: args.queries], np.load(folder / "truth.npy")
    deep = index.search(queries, REFINE * K)[1]
    scores = np.where(deep < 0, -np.inf, np.einsum("qd,qkd->qk", queries, vectors[deep]))
    refined = np.take_along_axis(deep, np.argsort(-scores, axis=1)[:, :K], 1)
    (raw,) = fastest(args.repeats, lambda: index.search(queries, REFINE * K))
    return {
        "build_seconds": seconds,
        "bytes_per_vector": (folder / "auto.index").stat().st_size / args.count,
        "factory": json.loads((folder / "auto.json").read_text("utf-8"))["index_key"],
        "recall": recall(refined, truth),
        "recall_without_refining": recall(index.search(queries, K)[1], truth),
        "raw_queries_per_second": len(queries) / raw,
    }


def heldout_hit_rate(args: RetrievalArguments) -> dict:
    """
    For every pair of concept and style of a held-out split: whether the concept is what the two documents of its
    caption show, one of them at least, and what the best document of its picture shows.
    """
    encoder = CLIPEncoder(args.clip_model)
    augmenter = RetrievalAugmenter(MemoryBank.load(args.bank, encoder.name), encoder)
    splits, concepts = load_dataset(args.dataset), {}
    for split in splits.values():
        concepts |= zip(split[args.id_column], split["concept"])
    held_out = splits[args.split].select_columns(["concept", "style", "captions", "image"])
    pairs = {(row["concept"], row["style"]): row for row in held_out.to_list()[::-1]}
    texts = [row["captions"][0] for row in pairs.values()]
    pictures = [read_image(row["image"]["bytes"] or row["image"]["path"]) for row in pairs.values()]
    found = {
        "heldout_hit_rate": augmenter.for_prompts(texts, 2),
        "heldout_picture_hit_rate": augmenter.for_pictures(pictures, 1),
    }
    hits = {
        name: [any(concepts[one["id"]] == concept for one in shown) for (concept, _), shown in zip(pairs, documents)]
        for name, documents in found.items()
    }
    return {name: sum(one) / len(one) for name, one in hits.items()} | {"heldout_prompts": len(pairs)}
