"""Puts adapters into the weights of their base, for a model folder that needs neither peft nor the base.

python recipes/sft/merge.py --adapters runs/cm3leon-emoji-lora --out runs/cm3leon-emoji-merged
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoProcessor
from trl import TrlParser

from cm3leon_hf.training.adapters import load_adapters


@dataclass
class MergeArguments:
    adapters: str = field(metadata={"help": "Output folder of a LoRA run."})
    out: str = field(metadata={"help": "Folder for the model."})
    base: str = field(default="", metadata={"help": "Folder of the base, where it is no longer where it was."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the weights."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the weights."})


def main(args: MergeArguments) -> None:
    model = load_adapters(args.adapters, args.base or None, dtype="float32").merge_and_unload()
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out, max_shard_size=args.max_shard_size)
    AutoProcessor.from_pretrained(args.adapters, device="cpu").save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main(*TrlParser(MergeArguments).parse_args_and_config())
