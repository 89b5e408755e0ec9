"""Turns the pictures of a data set into VQGAN codes, so that training reads codes instead of pictures.

    python recipes/data/tokenize_images.py --config recipes/data/codes_emoji.yaml

Every split becomes Parquet with the column `codes` in place of the pictures or beside them; broken pictures are skipped
and counted.
A stopped run goes on with the first split that is not there yet.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, Image, load_dataset
from transformers import AutoImageProcessor
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.images import read_image


@dataclass
class CodesArguments:
    dataset: str = field(metadata={"help": "Folder or hub name of an image data set that load_dataset reads."})
    vqgan: str = field(metadata={"help": "Folder of a trained VQGAN and its image processor."})
    output_dir: str = field(metadata={"help": "Folder for the Parquet files."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the pictures."})
    keep_images: bool = field(default=False, metadata={"help": "Keep the pictures beside their codes, for retrieval."})
    batch_size: int = field(default=64, metadata={"help": "Pictures encoded at a time."})


def picture(stored: dict):
    """The picture of an undecoded cell, whose bytes are in the data set or, for a folder of images, in a file."""
    return read_image(stored["bytes"] or stored["path"])


def readable(row: dict, column: str) -> bool:
    try:
        picture(row[column])
    except ValueError as error:
        print(f"skipped: {error}")
        return False
    return True


def codes(rows: dict, column: str, vqgan: CM3LeonVQGAN, processor) -> dict:
    pictures = [picture(stored) for stored in rows[column]]
    return {"codes": vqgan.encode(processor(pictures, return_tensors="pt")["pixel_values"]).cpu().numpy()}


def encode_split(name: str, split: Dataset, args: CodesArguments, vqgan: CM3LeonVQGAN, processor) -> Dataset:
    split = split.cast_column(args.image_column, Image(decode=False))
    kept = split.filter(readable, fn_kwargs={"column": args.image_column}, desc=f"reading {name}")
    encoded = kept.map(
        codes,
        batched=True,
        batch_size=args.batch_size,
        remove_columns=[] if args.keep_images else [args.image_column],
        fn_kwargs={"column": args.image_column, "vqgan": vqgan, "processor": processor},
        desc=f"encoding {name}",
    )
    counts = torch.tensor(encoded["codes"][:]).flatten().bincount(minlength=vqgan.config.num_embeddings)
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    print(
        f"{name}: {len(kept)} pictures, {len(split) - len(kept)} skipped; {int((counts > 0).sum())} of {len(counts)} "
        f"codes, {entropy:.2f} nats a code"
    )
    return encoded.cast_column(args.image_column, Image()) if args.keep_images else encoded


def main(args: CodesArguments) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(args.vqgan)
    folder = Path(args.output_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in load_dataset(args.dataset).items():
        path = folder / f"{name}-00000-of-00001.parquet"
        if path.exists():
            print(f"{name}: {path} is there; remove it to encode again")
            continue
        encode_split(name, split, args, vqgan, processor).to_parquet(path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main(*TrlParser(CodesArguments).parse_args_and_config())
