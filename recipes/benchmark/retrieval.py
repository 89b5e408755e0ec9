"""Measures the memory bank and the augmenter beside raw FAISS and autofaiss, on synthetic vectors.

    python recipes/benchmark/retrieval.py --out runs/benchmark
    python recipes/benchmark/retrieval.py --bank BANK --clip_model local-dir:CLIP --dataset DATA
    python recipes/benchmark/retrieval.py --count 20000     # tries it

The vectors are drawn by `retrieval_synthetic.py`. Every row of the table is a process of its own; all of it, raw FAISS
too, takes the same threads, queries and k. With a bank, its CLIP and its data set, the share of held-out prompts for
which a document of the right concept is among the two retrieved is measured too (`--count 0` measures only that). The
last line is JSON. Run it on an otherwise idle machine; a million vectors take 9 GB of disk beside `out`, which is free
again at the end.

autofaiss needs numpy below 2 and fails with FAISS's newest, so it wants an environment of its own; `--autofaiss` is its
command there:

    python -m venv autofaiss && autofaiss/bin/pip install autofaiss "faiss-cpu<1.8" "pyarrow<20"
"""

import json
import multiprocessing
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import faiss
import matplotlib.pyplot as plt
from retrieval_measures import (
    BATCH,
    K,
    RetrievalArguments,
    heldout_hit_rate,
    measure_autofaiss,
    measure_compressed,
    measure_flat,
    measure_load,
)
from retrieval_synthetic import write_shards, write_vectors
from tqdm import tqdm
from trl import TrlParser

from cm3leon_hf.retrieval.indexes import FLAT, FLAT_BELOW, choose_factory


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
        pool.apply(write_vectors, (folder, args.count, args.dimension, max(args.queries, 2 * BATCH)))
        pool.apply(write_shards, (folder,))
        rows[FLAT] = pool.apply(measure_flat, (folder, args))
        shutil.rmtree(folder / "flat")
        names = [own, *(name.format(lists=lists) for name in args.factories)]
        for name in tqdm(names, desc="indexes"):
            rows[name] = pool.apply(measure_compressed, (name, folder, args))
            if name == own:
                load = measure_load(folder / "compressed")
        budget = int(rows[own]["bytes_per_vector"] * args.count)
        try:
            rows["autofaiss"] = pool.apply(measure_autofaiss, (folder, args, budget))
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"autofaiss: not measured ({error}); see --help for the environment that it needs")
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
