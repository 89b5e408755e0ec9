"""Measures the memory bank and the augmenter beside raw FAISS and autofaiss, on synthetic vectors.

    python recipes/benchmark/retrieval.py --out runs/benchmark
    python recipes/benchmark/retrieval.py --bank BANK --clip_model local-dir:CLIP --dataset DATA

The vectors have a mean that they share, as CLIP's do, and lie in clusters whose sizes follow a power law, as do the
variances of their directions. Every row of the table is a process of its own. With a bank, its CLIP and its data set,
the share of held-out prompts for which a document of the right concept is among the two retrieved is measured too
(`--count 0` measures only that). The last line is JSON. Run it on an otherwise idle machine; a million vectors take
9 GB of disk beside `out`, which is free again at the end.

autofaiss needs numpy below 2, so it wants an environment of its own; `--autofaiss` is its command there:

    python -m venv autofaiss && autofaiss/bin/pip install autofaiss "pyarrow<20"
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import faiss
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from tqdm import tqdm
from trl import TrlParser

from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.bank_files import INDEX
from cm3leon_hf.retrieval.documents import FEATURES
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.indexes import FLAT, FLAT_BELOW, choose_factory
from cm3leon_hf.retrieval.memory_bank import REFINE, MemoryBank

K = 10  # documents a query in the table
BATCH = 256  # rows that the augmenter takes at a time, with two queries each
ENCODER = "synthetic"
SHARD = 50_000
SPREAD = 0.6  # about a cluster's centre: cosines of some 0.85 within clusters, and of 0.4 between them
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
    repeats: int = field(default=3, metadata={"help": "Runs of what is timed; the fastest counts."})
    autofaiss: str = field(default="autofaiss", metadata={"help": "Command of autofaiss; left out if there is none."})
    bank: str = field(default="", metadata={"help": "Folder of a bank to measure heldout_hit_rate on."})
    clip_model: str = field(default="", metadata={"help": "CLIP that made its vectors, such as local-dir:FOLDER."})
    dataset: str = field(default="", metadata={"help": "Its data set, with the columns captions, concept and style."})
    split: str = field(default="heldout_pairs", metadata={"help": "Held-out split that the prompts are from."})
    id_column: str = field(default="source", metadata={"help": "Column of the data set with the documents' ids."})


FACTORIES = ("IVF{lists},RaBitQ", "RR256,IVF{lists},RaBitQ", "RR96,IVF{lists},SQ4")  # all train in a minute


class NumberEncoder(CLIPEncoder):
    """In place of CLIP, so that what it costs is not measured: row numbers in texts and in pixels to vectors."""

    def __init__(self, vectors: np.ndarray):
        self.vectors, self.name = torch.from_numpy(vectors), ENCODER

    def embed_texts(self, texts, rngs=None, dropout=0.2):
        return self.vectors[[int(text) for text in texts]]

    def embed_images(self, images, rngs=None, dropout=0.2):
        return self.vectors[[int.from_bytes(image.tobytes()[:3], "big") for image in images]]


def write_vectors(folder: Path, args: RetrievalArguments) -> None:
    """Writes vectors to search, and queries from the same clusters, as `.npy`."""
    rng = np.random.default_rng(0)
    deviations = np.arange(1, args.dimension + 1) ** -0.5
    deviations /= np.linalg.norm(deviations)
    rotation = np.linalg.qr(rng.standard_normal((args.dimension, args.dimension)))[0].astype(np.float32)
    clusters = max(args.count // 250, 1)
    centres = (rng.standard_normal((clusters + 1, args.dimension)) * deviations).astype(np.float32)
    shares = 1 / np.arange(1, clusters + 1)

    def draw(count: int) -> np.ndarray:
        own = centres[-1] + centres[rng.choice(clusters, count, p=shares / shares.sum())]
        noise = rng.standard_normal((count, args.dimension), np.float32) * deviations.astype(np.float32)
        vectors = (own + SPREAD * noise) @ rotation
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    (folder / "vectors").mkdir()
    shape = (args.count, args.dimension)
    vectors = np.lib.format.open_memmap(folder / "vectors" / "vectors.npy", "w+", np.float32, shape)
    for start in range(0, args.count, SHARD):
        vectors[start : start + SHARD] = draw(len(vectors[start : start + SHARD]))
    vectors.flush()
    np.save(folder / "queries.npy", draw(max(args.queries, 2 * BATCH)))


def documents(start: int, stop: int) -> Dataset:
    """Documents with a text and the codes of an 8×8 picture."""
    rng, count = np.random.default_rng(start), stop - start
    names = [str(row) for row in range(start, stop)]
    codes = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(8192, size=64 * count, dtype=np.uint16)), 64)
    columns = {"id": names, "text": [f"document {name}" for name in names], "codes": codes.cast(pa.list_(pa.uint16()))}
    columns |= {"image": pa.nulls(count, pa.string()), "licence": ["CC0-1.0"] * count}
    columns["content"] = rng.integers(2**63, size=count, dtype=np.uint64)
    return Dataset(pa.table(columns, FEATURES.arrow_schema))


def write_shards(folder: Path) -> None:
    vectors = np.load(folder / "vectors" / "vectors.npy", mmap_mode="r")
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        part = vectors[start : start + SHARD]
        bank = MemoryBank.from_vectors(documents(start, start + len(part)), part, ENCODER)
        bank.save(folder / "shards" / f"{number:05d}")


def fastest(repeats: int, *calls) -> list[float]:
    """Seconds of each call; they take turns, so that other work on the machine meets all of them."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, seconds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [min(times) for times in seconds]


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
    numbers = range(0, 2 * BATCH, 2)
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


def measure(factory: str, folder: Path, args: RetrievalArguments) -> dict:
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
    """For every pair of concept and style of a held-out split: whether the two documents hold the concept."""
    encoder = CLIPEncoder(args.clip_model)
    augmenter = RetrievalAugmenter(MemoryBank.load(args.bank, encoder.name), encoder)
    splits = load_dataset(args.dataset).select_columns([args.id_column, "concept", "style", "captions"])
    concepts = {}
    for split in splits.values():
        concepts |= zip(split[args.id_column], split["concept"])
    prompts = {(row["concept"], row["style"]): row["captions"][0] for row in splits[args.split].to_list()[::-1]}
    found = augmenter.for_prompts(list(prompts.values()), 2)
    hits = [any(concepts[one["id"]] == concept for one in two) for (concept, _), two in zip(prompts, found)]
    return {"heldout_hit_rate": sum(hits) / len(hits), "heldout_prompts": len(hits)}


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| index | build s | bytes a vector | recall@10 | without refining | queries/s | FAISS alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ours = f"{row['queries_per_second']:.0f}" if "queries_per_second" in row else ""
        lines.append(
            f"| {name} | {row['build_seconds']:.0f} | {row['bytes_per_vector']:.1f} | {row['recall']:.3f} | "
            f"{row['recall_without_refining']:.3f} | {ours} | {row['raw_queries_per_second']:.0f} |"
        )
    return "\n".join(lines)


def plot(rows: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, row in rows.items():
        if name != FLAT:
            (line,) = axes.plot([row["bytes_per_vector"]] * 2, [row["recall_without_refining"], row["recall"]], "-")
            axes.plot(row["bytes_per_vector"], row["recall"], "o", color=line.get_color(), label=name)
    axes.axhline(0.95, color="tab:gray", linestyle=":")
    axes.axvline(64, color="tab:gray", linestyle=":")
    axes.set(xlabel="bytes a vector, ids and centroids included", ylabel=f"recall@{K}")
    axes.set_title("from the codes alone (lower end) to exact vectors having the last word (dot)", fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def figures(rows: dict[str, dict], own: str, load: dict) -> dict:
    flat, compressed = rows[FLAT], rows[own]
    return {
        "flat_over_faiss": flat["bank_over_raw"],
        "augmenter_over_search": flat["augmenter"]["over_raw"],
        "augmenter_over_compressed_search": compressed["augmenter"]["over_search"],
        "augmenter_overhead_ms_per_row": flat["augmenter"]["overhead_ms_per_row"],
        "recall_at_10": compressed["recall"],
        "bytes_per_vector": compressed["bytes_per_vector"],
        "build_seconds": compressed["build_seconds"],
        "queries_per_second": compressed["queries_per_second"],
        **load,
    }


def measure_rows(folder: Path, args: RetrievalArguments) -> tuple[dict[str, dict], str, dict]:
    """All rows of the table, the name of the bank's own choice of an index, and what loading that bank takes."""
    lists = int(choose_factory(max(args.count, FLAT_BELOW), args.dimension).split("IVF")[1].split(",")[0])
    lists = max(1, min(lists, args.count // 40))
    own = choose_factory(FLAT_BELOW, args.dimension).replace("IVF4096", f"IVF{lists}")
    rows = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        pool.apply(write_vectors, (folder, args))
        pool.apply(write_shards, (folder,))
        rows[FLAT] = pool.apply(measure_flat, (folder, args))
        shutil.rmtree(folder / "flat")
        names = [own, *(name.format(lists=lists) for name in args.factories)]
        for name in tqdm(names, desc="indexes"):
            rows[name] = pool.apply(measure, (name, folder, args))
            if name == own:
                load = measure_load(folder / "compressed")
        if shutil.which(args.autofaiss):
            budget = int(rows[own]["bytes_per_vector"] * args.count)
            rows["autofaiss"] = pool.apply(measure_autofaiss, (folder, args, budget))
        else:
            print(f"autofaiss: not measured, for there is no command {args.autofaiss!r}; it needs numpy below 2")
    return rows, own, load


def main(args: RetrievalArguments) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    summary, rows = {}, {}
    if args.bank:
        summary |= heldout_hit_rate(args)
    if args.count:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            rows, own, load = measure_rows(Path(folder), args)
        print(table(rows))
        plot(rows, out / "retrieval.png")
        summary = figures(rows, own, load) | summary
    record = {"arguments": asdict(args), "threads": faiss.omp_get_max_threads(), "rows": rows, "figures": summary}
    (out / "retrieval.json").write_text(json.dumps(record, indent=2))
    print(json.dumps({name: round(value, 3) for name, value in summary.items()}))


if __name__ == "__main__":
    main(*TrlParser(RetrievalArguments).parse_args_and_config())
