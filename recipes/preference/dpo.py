"""Tunes a CM3Leon on pairs of better and worse pictures (DPO, Rafailov et al. 2023).

    python recipes/preference/pairs.py --dataset data/emoji-codes --out data/emoji-pairs
    python recipes/preference/dpo.py --config recipes/preference/emoji_dpo.yaml

Pairs by people serve as well: rows with `prompt_ids`, `chosen_ids` and `rejected_ids`. Every value of the YAML is a
flag as well: those below, TRL's `DPOConfig`, and its `ModelConfig` for the base and adapters.
"""

import os
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import DPOConfig, ModelConfig, TrlParser, get_peft_config
from tuning import train_and_save

from cm3leon_hf import default_model
from cm3leon_hf.training.adapters import TARGETS
from cm3leon_hf.training.preference import PicturePairsTrainer

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@dataclass
class PairsArguments:
    dataset: str = field(metadata={"help": "Folder of the pairs."})
    split: str = field(default="train", metadata={"help": "Split to train on."})


def read_pairs(args: PairsArguments):
    rows = load_dataset(args.dataset, split=args.split)
    if not set(COLUMNS) <= set(rows.column_names):
        raise ValueError(f"expected the columns {COLUMNS}, got {rows.column_names}; draw pairs with pairs.py")
    return rows.select_columns(COLUMNS)


def main(args: PairsArguments, training: DPOConfig, model_args: ModelConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = read_pairs(args)
    base = model_args.model_name_or_path or default_model()
    model, reference = (AutoModelForCausalLM.from_pretrained(base, dtype=model_args.dtype) for _ in range(2))
    processor = AutoProcessor.from_pretrained(base, device="cpu")
    model_args.lora_target_modules = model_args.lora_target_modules or TARGETS
    trainer = PicturePairsTrainer(
        model=model,
        ref_model=None if model_args.use_peft else reference,  # adapters can be turned off
        args=training,
        train_dataset=rows,
        processing_class=processor.tokenizer,
        peft_config=get_peft_config(model_args),
    )
    train_and_save(trainer, processor)


if __name__ == "__main__":
    main(*TrlParser((PairsArguments, DPOConfig, ModelConfig)).parse_args_and_config())
