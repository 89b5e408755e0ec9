"""Tunes a VQGAN's decoder on codes that a language model drew; encoder and codebook stay, and so does every code.

    python recipes/vqgan/tune_decoder.py --config recipes/vqgan/emoji_decoder.yaml

Every value of the YAML is a flag as well. A run that was stopped goes on from its last checkpoint. The output folder
takes the place of the model folder's `vqgan`.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor, TrainingArguments
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN, default_model
from cm3leon_hf.data.redrawing import RedrawnCodes
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.vqgan import VQGANDecoderObjective, VQGANLossConfig, VQGANTrainer

COLUMNS = ["image", "captions", "codes"]


@dataclass
class DecoderArguments:
    dataset: str = field(metadata={"help": "Folder of a data set with the columns image, captions and codes."})
    vqgan: str = field(metadata={"help": "Folder of the VQGAN that made the codes."})
    model: str = field(default="", metadata={"help": "Model folder that redraws codes; the shipped one by default."})
    share: float = field(default=0.5, metadata={"help": "Largest share of a picture's codes that is redrawn."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split to measure PSNR on."})


def main(args: DecoderArguments, losses: VQGANLossConfig, training: TrainingArguments) -> None:
    torch.manual_seed(training.seed)
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan, dtype=torch.float32)
    path = args.model or default_model()
    model, processor = AutoModelForCausalLM.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    redrawn = RedrawnCodes(model.to(training.device), processor, args.share)
    splits = load_dataset(args.dataset).select_columns(COLUMNS)
    held_out = splits[args.eval_split]
    trainer = VQGANTrainer(
        model=VQGANDecoderObjective(vqgan, losses),
        args=training,
        train_dataset=splits[args.train_split].with_transform(redrawn),
        eval_dataset={
            "own_codes": held_out.with_transform(replace(redrawn, share=0.0)),
            "redrawn_codes": held_out.with_transform(redrawn),
        },
        compute_metrics=lambda result: {"psnr": float(np.mean(result.predictions))},
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    vqgan.to(torch.bfloat16).save_pretrained(training.output_dir)
    processor.image_processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main(*TrlParser((DecoderArguments, VQGANLossConfig, TrainingArguments)).parse_args_and_config())
