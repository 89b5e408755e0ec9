"""Trains the VQGAN image tokenizer on an image data set.

    python recipes/vqgan/train.py --config recipes/vqgan/emoji.yaml

Every value of the YAML except `vqgan` is a flag as well (`--max_steps 100`). A run that was stopped goes on from its
last checkpoint.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import load_dataset
from tqdm import tqdm
from transformers import TrainingArguments
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN, CM3LeonVQGANConfig
from cm3leon_hf.images import default_image_processor, read_image
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.codebook import keep_codes
from cm3leon_hf.training.vqgan import VQGANLossConfig, VQGANObjective, VQGANTrainer


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "Folder or hub name of an image data set that load_dataset reads."})
    vqgan: dict = field(metadata={"help": "Fields of CM3LeonVQGANConfig (in the YAML)."})
    init_from: str = field(default="", metadata={"help": "VQGAN folder to start from; another codebook starts anew."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the pictures."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split to measure PSNR on."})


def pixels(rows: dict, processor, column: str) -> dict:
    images = [read_image(image) for image in rows[column]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}


def build_vqgan(data: DataArguments) -> CM3LeonVQGAN:
    config = CM3LeonVQGANConfig(**data.vqgan)
    if not data.init_from:
        return CM3LeonVQGAN(config)
    return CM3LeonVQGAN.from_pretrained(
        data.init_from, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )


def used_codes(vqgan: CM3LeonVQGAN, batches) -> torch.LongTensor:
    counts = torch.zeros(vqgan.config.num_embeddings, dtype=torch.long)
    for batch in tqdm(batches, desc="which codes are used"):
        counts += vqgan.encode(batch["pixel_values"]).flatten().bincount(minlength=len(counts)).cpu()
    return counts.nonzero().flatten()


def main(data: DataArguments, losses: VQGANLossConfig, training: TrainingArguments) -> None:
    torch.manual_seed(training.seed)
    vqgan = build_vqgan(data)
    processor = default_image_processor(vqgan.config)
    splits = load_dataset(data.dataset).select_columns([data.image_column])
    splits.set_transform(lambda rows: pixels(rows, processor, data.image_column))
    trainer = VQGANTrainer(
        model=VQGANObjective(vqgan, losses),
        args=training,
        train_dataset=splits[data.train_split],
        eval_dataset=splits[data.eval_split],
        compute_metrics=lambda result: {"psnr": float(np.mean(result.predictions))},
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    used = used_codes(vqgan.eval(), trainer.get_test_dataloader(splits[data.train_split]))
    print(f"{len(used)} of {vqgan.config.num_embeddings} codes draw the training split; the others are dropped")
    keep_codes(vqgan, used)
    vqgan.save_pretrained(training.output_dir)
    processor.save_pretrained(training.output_dir)
    print(f"VQGAN in {training.output_dir}: {trainer.evaluate()}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((DataArguments, VQGANLossConfig, TrainingArguments)).parse_args_and_config())
