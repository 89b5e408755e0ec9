"""Builds a memory bank from an image-caption data set: Parquet, webdataset, or streamed from the hub.

    python recipes/retrieval/build_bank.py --config recipes/retrieval/bank_emoji.yaml

A stopped build goes on with its missing shards. Over machines that share a folder, each encodes its share:

    accelerate launch recipes/retrieval/build_bank.py --config …

Then the first process merges all shards. Rows whose pictures cannot be read are left out and listed in `skipped.json`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from trl import TrlParser

from cm3leon_hf.evaluation.processes import start_processes
from cm3leon_hf.retrieval.building import undecoded, write_shards
from cm3leon_hf.retrieval.documents import PUBLIC
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@dataclass
class BankArguments:
    dataset: str = field(metadata={"help": "Folder, or hub name, of a data set that load_dataset reads."})
    folder: str = field(metadata={"help": "Where the bank goes; a bank that is there is replaced."})
    split: str = field(default="train", metadata={"help": "Split whose rows become documents."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set as a stream, without a copy on disk."})
    columns: dict = field(
        default_factory=dict,
        metadata={"help": "Which columns are id, text, image, codes and licence, where they have other names (YAML)."},
    )
    clip_model: str = field(default="ViT-B-32", metadata={"help": "CLIP of open_clip, or local-dir:FOLDER."})
    clip_weights: str = field(default="openai", metadata={"help": "Name or file of its weights."})
    batch_size: int = field(default=256, metadata={"help": "Documents in one forward pass of CLIP."})
    shard_size: int = field(default=50_000, metadata={"help": "Rows in a shard: what a stopped build may lose."})
    factory: str = field(default="", metadata={"help": "Factory string of FAISS; chosen by size when left out."})
    max_score: float = field(default=0.9, metadata={"help": "Documents above this score are copies of the query."})


def documents(rows, columns: dict):
    """The rows with a bank's columns only: of several captions the first, and row numbers where there are no ids."""
    columns = {name: columns.get(name, name) for name in PUBLIC}
    there = rows.column_names or list(columns.values())  # a stream may not know its columns
    missing = {columns["text"], columns["image"]} - set(there)
    if missing:
        raise ValueError(f"expected the columns {sorted(missing)}, got {there}; name yours under `columns`")
    rows = undecoded(rows, columns["image"])
    columns = {column: name for name, column in columns.items() if column in there}
    rows = rows.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if "id" not in columns.values():
        rows = rows.map(lambda _, number: {"id": str(number)}, with_indices=True, input_columns="text")
    return rows.map(lambda text: {"text": text if isinstance(text, str) else text[0]}, input_columns="text")


def main(args: BankArguments) -> None:
    process = start_processes()
    encoder = CLIPEncoder(args.clip_model, args.clip_weights, device=process.device, batch_size=args.batch_size)
    rows = documents(load_dataset(args.dataset, split=args.split, streaming=args.streaming), args.columns)
    start = time.perf_counter()
    if process.num_processes > 1:
        shards = f"{args.folder}.shards"
        write_shards(rows, encoder, shards, args.shard_size, process.process_index, process.num_processes)
        process.wait_for_everyone()
    if process.is_main_process:
        bank = MemoryBank.build(rows, encoder, args.folder, args.shard_size, args.factory or None, args.max_score)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(args.folder).iterdir())
        print(
            f"{args.folder}: {len(bank)} documents at {len(bank) / seconds:.0f} a second, {len(bank.skipped)} rows "
            f"skipped, {size / 1e6:.1f} MB, index {bank.factory}"
        )


if __name__ == "__main__":
    main(*TrlParser(BankArguments).parse_args_and_config())
