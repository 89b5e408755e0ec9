"""Tunes a CM3Leon so that its pictures fit their captions better, by a CLIP reward (GRPO, Shao et al. 2024).

    python recipes/preference/grpo.py --config recipes/preference/emoji_grpo.yaml

Each step draws a group of pictures for each caption, from the model's own distribution, and moves the model toward
those that CLIP finds better than the group. Every value of the YAML is a flag as well: those below, TRL's `GRPOConfig`,
and its `ModelConfig` for the base and adapters. `reward` in the logs is the mean cosine of CLIP.
"""

import os
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config
from tuning import train_and_save

from cm3leon_hf import default_clip, default_model
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.training.adapters import TARGETS
from cm3leon_hf.training.preference import ON_POLICY, PictureReward, prompt_rows


@dataclass
class RewardArguments:
    dataset: str = field(metadata={"help": "Folder of a data set with the column captions, each a list of wordings."})
    split: str = field(default="train", metadata={"help": "Split whose captions are the prompts."})
    clip_model: str = field(default="", metadata={"help": "CLIP of open_clip; the shipped one by default."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})


def captions(dataset: str, split: str) -> list[str]:
    """The first wording of every row, each once."""
    return sorted({wordings[0] for wordings in load_dataset(dataset, split=split)["captions"]})


def main(args: RewardArguments, training: GRPOConfig, model_args: ModelConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if training.beta and not model_args.use_peft:
        raise ValueError(f"expected beta 0 or use_peft, whose base is the reference, got beta {training.beta}; set one")
    base = model_args.model_name_or_path or default_model()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=model_args.dtype)
    processor = AutoProcessor.from_pretrained(base, device="cpu" if training.use_cpu else None)
    scorer = CLIPScorer(args.clip_model or default_clip(), args.clip_weights, training.device)
    model_args.lora_target_modules = model_args.lora_target_modules or TARGETS
    training.generation_kwargs = ON_POLICY | (training.generation_kwargs or {})
    training.max_completion_length = processor.vocabulary.image_length
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=PictureReward(processor, scorer),
        args=training,
        train_dataset=prompt_rows(captions(args.dataset, args.split)),
        processing_class=processor.tokenizer,
        peft_config=get_peft_config(model_args),
    )
    train_and_save(trainer, processor)


if __name__ == "__main__":
    main(*TrlParser((RewardArguments, GRPOConfig, ModelConfig)).parse_args_and_config())
