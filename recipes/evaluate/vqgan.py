"""Measures how much of a picture an image tokenizer keeps: PSNR, SSIM and rFID, each with its interval.

    python recipes/evaluate/vqgan.py --dataset data/emoji --split heldout_pairs --model MODEL --features open_clip:…

Pictures are compared as the model sees them, scaled and cropped. The last line printed is JSON.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.files import batched, readable_rows
from cm3leon_hf.evaluation.measuring import SeenPictures
from cm3leon_hf.evaluation.reconstruction import measure_reconstruction
from cm3leon_hf.evaluation.results import markdown_table, summary


@dataclass
class VQGANArguments:
    dataset: str = field(metadata={"help": "Folder or hub name of a data set with pictures."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to measure on."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    count: int = field(default=0, metadata={"help": "First pictures of the split; all by default."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    features: str = field(default="inception", metadata={"help": "Network of rFID; see load_network."})
    feature_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that cannot be read."})
    batch_size: int = field(default=16, metadata={"help": "Pictures at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def main(args: VQGANArguments) -> None:
    rows = load_dataset(args.dataset, split=args.split)
    rows = rows.select(range(args.count)) if args.count else rows
    rows = readable_rows(rows, args.image_column, args.skip_broken)
    network = load_network(args.features, args.feature_weights or None)
    processor = AutoProcessor.from_pretrained(args.model or default_model())
    originals = list(SeenPictures(rows[args.image_column], processor.image_processor))
    kept = []
    for batch in tqdm(list(batched(originals, args.batch_size)), desc="reconstructing"):
        kept += processor.decode_images(processor.encode_images(batch))
    measured = {
        Path(args.model or default_model()).name: measure_reconstruction(
            originals, kept, network, args.resamples, args.seed
        )
    }
    print(f"{markdown_table(measured)}\n\n{len(rows)} pictures; features: {network.name}")
    print(json.dumps(summary(measured)))


if __name__ == "__main__":
    main(*TrlParser(VQGANArguments).parse_args_and_config())
