"""Turns the pictures of a data set into VQGAN codes, so that training reads codes instead of pictures.

    python recipes/data/tokenize_images.py --config recipes/data/codes_emoji.yaml

Every split becomes Parquet with the column `codes` in place of the pictures; broken pictures are skipped and counted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Image, load_dataset
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
    batch_size: int = field(default=64, metadata={"help": "Pictures encoded at a time."})


def readable(row: dict, column: str) -> bool:
    try:
        read_image(row[column]["bytes"])
    except ValueError as error:
        print(f"skipped: {error}")
        return False
    return True


def codes(rows: dict, column: str, vqgan: CM3LeonVQGAN, processor) -> dict:
    pictures = [read_image(image["bytes"]) for image in rows[column]]
    return {"codes": vqgan.encode(processor(pictures, return_tensors="pt")["pixel_values"]).numpy()}


def main(args: CodesArguments) -> None:
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan).eval()
    processor = AutoImageProcessor.from_pretrained(args.vqgan)
    for name, split in load_dataset(args.dataset).items():
        split = split.cast_column(args.image_column, Image(decode=False))
        kept = split.filter(readable, fn_kwargs={"column": args.image_column}, desc=f"reading {name}")
        print(f"{name}: {len(kept)} pictures, {len(split) - len(kept)} skipped")
        encoded = kept.map(
            codes,
            batched=True,
            batch_size=args.batch_size,
            remove_columns=[args.image_column],
            fn_kwargs={"column": args.image_column, "vqgan": vqgan, "processor": processor},
            desc=f"encoding {name}",
        )
        path = Path(args.output_dir) / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded.to_parquet(path)
        used = len({code for row in encoded["codes"] for code in row})
        print(f"{name}: {used} of {vqgan.config.num_embeddings} codes used")


if __name__ == "__main__":
    main(*TrlParser(CodesArguments).parse_args_and_config())
