"""Turns the pictures of a data set into VQGAN codes, so that training reads codes instead of pictures.

    python recipes/data/tokenize_images.py --config recipes/data/codes_emoji.yaml
    torchrun --nproc-per-node 8 recipes/data/tokenize_images.py --config YAML     # or: srun, one process a GPU

Every split becomes `num_shards` Parquet files with the column `codes` in place of the pictures or beside them; broken
pictures are skipped and counted. Processes, on one machine or many, share the files: process `rank` of `world_size`
writes every `world_size`-th. A stopped run goes on with the first file that is not there yet. With a `card`, the folder
is ready to be published: `hf upload --repo-type dataset NAME FOLDER`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import DatasetCardData
from transformers import AutoImageProcessor
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.data.shards import ShardArguments, write_parquet
from cm3leon_hf.data.tokenization import ImageTokenizer


@dataclass
class CodesArguments(ShardArguments):
    vqgan: str = field(metadata={"help": "Folder of a trained VQGAN and its image processor."})
    output_dir: str = field(metadata={"help": "Folder for the Parquet files."})
    keep_images: bool = field(default=False, metadata={"help": "Keep the pictures beside the codes, for retrieval."})
    moved_copies: int = field(default=0, metadata={"help": "Codes of so many moved copies of each picture besides."})
    moved_split: str = field(default="train", metadata={"help": "The split that gets moved copies."})
    batch_size: int = field(default=64, metadata={"help": "Pictures encoded at a time."})
    card: dict = field(default_factory=dict, metadata={"help": "license, language … of the data card (in the YAML)."})

    def __post_init__(self):
        super().__post_init__()
        if self.card and "license" not in self.card:
            raise ValueError(f"expected a license in card, got {sorted(self.card)}; name that of the pictures")


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
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan).eval().to(args.device)
    processor = AutoImageProcessor.from_pretrained(args.vqgan)
    for shard in args.missing_shards(Path(args.output_dir) / "data", "to encode again"):
        torch.manual_seed(shard.index)  # of the moves
        copies = args.moved_copies if shard.split == args.moved_split else 0
        tokenizer = ImageTokenizer(vqgan, processor, args.image_column, copies, args.keep_images)
        encoded = tokenizer.encode(shard.rows, args.batch_size)
        if args.card and shard.index == 0:
            write_card(args, vqgan, encoded.features)
        write_parquet(encoded, shard.path)
        print(f"{shard.split}: {tokenizer.report()} ({shard.path.name})")


if __name__ == "__main__":
    main(*TrlParser(CodesArguments).parse_args_and_config())
