"""Pretrains a CM3Leon on captions and cached image codes, and writes a model folder that AutoModel loads.

    python recipes/pretrain/train.py --config recipes/pretrain/emoji/train.yaml

Every value of the YAML except `generation` is a flag as well. A run that was stopped goes on from its last checkpoint.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    TrainingArguments,
)
from trl import TrlParser

from cm3leon_hf import CM3LeonForCausalLM, CM3LeonProcessor, CM3LeonVQGAN
from cm3leon_hf.data.pretraining import CausalCollator, CM3Transform, balanced_rows
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.optimizers import muon
from cm3leon_hf.training.throughput import ThroughputTrainer


@dataclass
class PretrainArguments:
    dataset: str = field(metadata={"help": "Folder of a data set with the columns captions and codes."})
    model_config: str = field(metadata={"help": "Folder with the model's config.json."})
    tokenizer: str = field(metadata={"help": "Folder of the text tokenizer."})
    vqgan: str = field(metadata={"help": "Folder of the VQGAN that made the codes."})
    generation: dict = field(default_factory=dict, metadata={"help": "Generation defaults to save (in the YAML)."})
    init_from: str = field(default="", metadata={"help": "Model folder to start from, in place of fresh weights."})
    muon: bool = field(default=False, metadata={"help": "Train the layers' matrices with Muon (timm) at this rate."})
    balance: list[str] = field(default_factory=list, metadata={"help": "Columns; their groups are seen equally often."})
    passes: int = field(default=1, metadata={"help": "How often an epoch sees each group of `balance`."})
    span_rate: float = field(default=1.0, metadata={"help": "Mean number of moved spans, clipped to one."})
    whole_segment: float = field(default=0.0, metadata={"help": "Share of moved spans that are a whole text or image."})
    instruction_share: float = field(default=0.0, metadata={"help": "Share of captioning examples with instruction."})
    image_noise: float = field(default=0.0, metadata={"help": "Largest share of image tokens to read wrongly."})
    bank: str = field(default="", metadata={"help": "Memory bank to retrieve documents from for the training rows."})
    clip_model: str = field(
        default="ViT-B-32", metadata={"help": "CLIP of the bank: of open_clip, or local-dir:FOLDER."}
    )
    clip_weights: str = field(default="openai", metadata={"help": "Name or file of its weights."})
    retrieved_shares: list[float] = field(
        default_factory=lambda: [0.4, 0.2, 0.4],
        metadata={"help": "Share of batches with 0, 1, 2 … retrieved documents."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split to measure the loss on."})


def build_processor(args: PretrainArguments, config) -> CM3LeonProcessor:
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan, dtype=torch.bfloat16)
    config.image_vocab_size = vqgan.config.num_embeddings  # known only when its codebook is trained
    return CM3LeonProcessor(
        AutoImageProcessor.from_pretrained(args.vqgan),
        AutoTokenizer.from_pretrained(args.tokenizer),
        vqgan,
        text_vocab_size=config.text_vocab_size,
        image_vocab_size=config.image_vocab_size,
        image_grid_size=config.image_grid_size,
    )


def build_model(args: PretrainArguments, config) -> CM3LeonForCausalLM:
    if not args.init_from:
        return CM3LeonForCausalLM(config)
    return CM3LeonForCausalLM.from_pretrained(args.init_from, config=config, dtype=torch.float32)


def training_rows(args: PretrainArguments) -> Dataset:
    rows = load_dataset(args.dataset, split=args.train_split)
    if args.balance:
        groups = zip(*(rows[column] for column in args.balance))
        rows = rows.select(balanced_rows(groups, args.passes))
    return rows


def retrieval(args: PretrainArguments, seed: int):
    from cm3leon_hf.data.retrieved import RetrievalTransform
    from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
    from cm3leon_hf.retrieval.encoder import CLIPEncoder
    from cm3leon_hf.retrieval.memory_bank import MemoryBank

    encoder = CLIPEncoder(args.clip_model, args.clip_weights)
    return RetrievalTransform(
        RetrievalAugmenter(MemoryBank.load(args.bank, encoder.name), encoder),
        args.retrieved_shares,
        np.random.default_rng(seed),
    )


def main(args: PretrainArguments, training: TrainingArguments) -> None:
    torch.manual_seed(training.seed)
    config = AutoConfig.from_pretrained(args.model_config, use_cache=False)
    processor = build_processor(args, config)
    transform = CM3Transform(
        processor.tokenizer,
        config.vocabulary,
        np.random.default_rng(training.seed),
        whole_segment=args.whole_segment,
        span_rate=args.span_rate,
        instruction_share=args.instruction_share,
        max_length=config.max_position_embeddings,
    )
    training_transform = replace(transform, image_noise=args.image_noise)
    train, columns = training_rows(args), ["captions", "codes"]
    if args.bank:
        augment = retrieval(args, training.seed)
        train = train.select_columns([*columns, "image"])
        train = train.with_transform(lambda rows: training_transform(augment(rows)))
    else:
        train = train.select_columns(columns).with_transform(training_transform)
    held_out = load_dataset(args.dataset, split=args.eval_split).select_columns(columns).with_transform(transform)
    model = build_model(args, config)
    trainer = ThroughputTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=CausalCollator(pad_token_id=config.pad_token_id),
        optimizers=(muon(model, training) if args.muon else None, None),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    print(f"held out: {trainer.evaluate()}")
    model = trainer.model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config = GenerationConfig.from_model_config(config)
    model.generation_config.update(**args.generation)
    model.save_pretrained(training.output_dir, max_shard_size="15MB")
    processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main(*TrlParser((PretrainArguments, TrainingArguments)).parse_args_and_config())
