"""Turns the pictures of a data set into VQGAN codes, so that training reads codes instead of pictures.

    python recipes/data/tokenize_images.py --config recipes/data/codes_emoji.yaml
    torchrun --nproc-per-node 8 recipes/data/tokenize_images.py --config YAML     # or: srun, one process a GPU

Every split becomes `num_shards` Parquet files with the column `codes` in place of the pictures or beside them; broken
pictures are skipped and counted. Processes, on one machine or many, share the files: process `rank` of `world_size`
writes every `world_size`-th. A stopped run goes on with the first file that is not there yet. With a `card`, the folder
is ready to be published: `hf upload --repo-type dataset NAME FOLDER`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import IterableDataset, load_dataset
from huggingface_hub import DatasetCardData
from transformers import AutoImageProcessor
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.data.tokenization import ImageTokenizer


def environment(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


@dataclass
class CodesArguments:
    dataset: str = field(metadata={"help": "Folder, hub name, or format of `files`: parquet, webdataset, imagefolder."})
    vqgan: str = field(metadata={"help": "Folder of a trained VQGAN and its image processor."})
    output_dir: str = field(metadata={"help": "Folder for the Parquet files."})
    files: str | None = field(default=None, metadata={"help": "Pattern of files, such as shards/*.tar."})
    streaming: bool = field(default=False, metadata={"help": "Read without downloading; a file a source's file."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the pictures."})
    keep_images: bool = field(default=False, metadata={"help": "Keep the pictures beside the codes, for retrieval."})
    moved_copies: int = field(default=0, metadata={"help": "Codes of so many moved copies of each picture besides."})
    moved_split: str = field(default="train", metadata={"help": "The split that gets moved copies."})
    batch_size: int = field(default=64, metadata={"help": "Pictures encoded at a time."})
    num_shards: int = field(default=1, metadata={"help": "Files for each split that is not streamed."})
    card: dict = field(default_factory=dict, metadata={"help": "license, language … of the data card (in the YAML)."})
    rank: int = field(
        default_factory=lambda: environment("RANK", "SLURM_PROCID", default=0),
        metadata={"help": "Number of this process; torchrun and Slurm set it."},
    )
    world_size: int = field(
        default_factory=lambda: environment("WORLD_SIZE", "SLURM_NTASKS", default=1),
        metadata={"help": "Number of processes; torchrun and Slurm set it."},
    )

    def __post_init__(self):
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"expected a rank from 0 to {self.world_size - 1}, got {self.rank}; count from 0")
        if self.card and "license" not in self.card:
            raise ValueError(f"expected a license in card, got {sorted(self.card)}; name that of the pictures")


def in_shards(split, num_shards: int) -> list[IterableDataset]:
    """The parts of a split that become a file each: the given number, or the files of a stream."""
    if isinstance(split, IterableDataset):
        return [split.shard(split.num_shards, index) for index in range(split.num_shards)]
    return [split.shard(num_shards, index).to_iterable_dataset() for index in range(num_shards)]


def device(rank: int) -> torch.device:
    kind = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(kind.type, rank % torch.accelerator.device_count()) if kind else torch.device("cpu")


def write_card(args: CodesArguments, vqgan: CM3LeonVQGAN, columns: dict) -> None:
    """The folder's README.md; with it, `hf upload --repo-type dataset NAME FOLDER` publishes the folder as it is."""
    tasks = ["text-to-image", "image-to-text"]
    data = DatasetCardData(**{"task_categories": tasks, "tags": ["cm3leon", "vqgan-codes"]} | args.card)
    grid, codes = vqgan.config.grid_size, vqgan.config.num_embeddings
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {data.pretty_name or Path(args.output_dir).resolve().name}\n",
        f"Pictures of `{args.dataset}` as codes of the VQGAN `{Path(args.vqgan).name}`: {grid}×{grid} codes a picture",
        f"in raster order, each in [0, {codes}). Only that VQGAN turns them into pictures again. The licence is",
        "that of the pictures; keep their credits when you pass the codes on.\n",
        "| column | type |\n|---|---|",
        *(f"| `{name}` | `{kind}` |" for name, kind in columns.items()),
    ]
    (Path(args.output_dir) / "README.md").write_text("\n".join([*lines, ""]), "utf-8")


def main(args: CodesArguments) -> None:
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan).eval().to(device(args.rank))
    processor = AutoImageProcessor.from_pretrained(args.vqgan)
    folder = Path(args.output_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in load_dataset(args.dataset, data_files=args.files, streaming=args.streaming).items():
        parts = in_shards(split, args.num_shards)
        for index in range(args.rank, len(parts), args.world_size):
            path = folder / f"{name}-{index:05d}-of-{len(parts):05d}.parquet"
            if path.exists():
                print(f"{name}: {path} is there; remove it to encode again")
                continue
            torch.manual_seed(index)  # of the moves
            copies = args.moved_copies if name == args.moved_split else 0
            tokenizer = ImageTokenizer(vqgan, processor, args.image_column, copies, args.keep_images)
            encoded = tokenizer.encode(parts[index], args.batch_size)
            encoded.to_parquet(path.with_suffix(".part"))
            if args.card and index == 0:
                write_card(args, vqgan, encoded.features)
            path.with_suffix(".part").rename(path)
            print(f"{name}: {tokenizer.report()} ({path.name})")


if __name__ == "__main__":
    main(*TrlParser(CodesArguments).parse_args_and_config())
