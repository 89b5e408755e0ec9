"""Pretrains a CM3Leon on texts and cached image codes, and writes a model folder that AutoModel loads.

    python recipes/pretrain/train.py --config recipes/pretrain/emoji/train.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/pretrain/train.py --config YAML

Every value of the YAML except `sources`, `generation` and `card` is a flag as well. A run that was stopped goes on from
its last checkpoint, to the last bit as if it had not been.
"""

import os
from dataclasses import asdict, dataclass, field, replace

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    TrainingArguments,
)
from trl import TrlParser

from cm3leon_hf import CM3LeonForCausalLM, CM3LeonProcessor, CM3LeonVQGAN
from cm3leon_hf.data.arguments import RowArguments, TransformArguments
from cm3leon_hf.data.pretraining import CausalCollator, CM3Rows, balanced_rows
from cm3leon_hf.data.stream import PackedStream
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.batches import set_accumulation
from cm3leon_hf.training.cards import write_card
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.optimizers import muon
from cm3leon_hf.training.pretraining import PretrainingTrainer
from cm3leon_hf.training.saving import save_model


@dataclass
class ObjectiveArguments(TransformArguments):
    image_first: float = field(default=0.0, metadata={"help": "Share of pairs with the image in front of the text."})
    instruction_share: float = field(default=0.0, metadata={"help": "Share of captioning examples with instruction."})


@dataclass(kw_only=True)
class PretrainArguments(RowArguments):
    model_config: str = field(metadata={"help": "Folder with the model's config.json."})
    tokenizer: str = field(metadata={"help": "Folder of the text tokenizer."})
    vqgan: str = field(metadata={"help": "Folder of the VQGAN that made the codes."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split of `dataset` to measure the loss on."})
    generation: dict = field(default_factory=dict, metadata={"help": "Generation defaults to save (in the YAML)."})
    card: dict = field(default_factory=dict, metadata={"help": "license, language … of the model card (in the YAML)."})
    init_from: str = field(default="", metadata={"help": "Model folder to start from, in place of fresh weights."})
    muon: bool = field(default=False, metadata={"help": "Train the layers' matrices with Muon (timm) at this rate."})
    balance: list[str] = field(default_factory=list, metadata={"help": "Columns; their groups are seen equally often."})
    passes: int = field(default=1, metadata={"help": "How often an epoch sees each group of `balance`."})
    packing: bool = field(default=False, metadata={"help": "Pack documents to the model's length; needs max_steps."})
    separate_documents: bool = field(default=False, metadata={"help": "Hide packed documents from each other."})
    batch_tokens: int = field(default=0, metadata={"help": "Tokens of a batch; sets gradient_accumulation_steps."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps without finite gradient to skip at most."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the model's weights."})

    def __post_init__(self):
        super().__post_init__()
        if self.card and "license" not in self.card:
            raise ValueError(f"expected a license in card, got {sorted(self.card)}; name one, such as apache-2.0")
        if self.sources and not self.packing:
            raise ValueError("expected packing with sources, got packing: false; set it, or name a dataset")
        if self.sources and self.balance:
            raise ValueError(f"expected balance with a dataset, got {self.balance} with sources; weight these instead")


def build_processor(args: PretrainArguments, config) -> CM3LeonProcessor:
    vqgan = CM3LeonVQGAN.from_pretrained(args.vqgan, dtype=torch.bfloat16)
    config.image_vocab_size = vqgan.config.num_embeddings  # known only when its codebook is trained
    return CM3LeonProcessor(
        AutoImageProcessor.from_pretrained(args.vqgan),
        AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=config.max_position_embeddings),
        vqgan,
        text_vocab_size=config.text_vocab_size,
        image_vocab_size=config.image_vocab_size,
        image_grid_size=config.image_grid_size,
    )


def build_model(args: PretrainArguments, config) -> CM3LeonForCausalLM:
    if not args.init_from:
        return CM3LeonForCausalLM(config)
    return CM3LeonForCausalLM.from_pretrained(args.init_from, config=config, dtype=torch.float32)


def training_data(args: PretrainArguments, transform: CM3Transform, training: TrainingArguments):
    """Packed sequences, or single documents."""
    rows, seed = args.training_rows(), training.seed
    if args.balance:
        groups = zip(*(rows[column] for column in args.balance))
        rows = rows.select(balanced_rows(groups, args.passes))
    if not args.packing:
        return CM3Rows(rows, transform, seed)
    process = (training.process_index, training.world_size)
    return PackedStream(rows, transform, args.window, seed, args.separate_documents, *process)


def held_out(args: PretrainArguments, transform: CM3Transform) -> CM3Rows | None:
    rows = args.held_out_rows()
    return None if rows is None else CM3Rows(rows, replace(transform, image_noise=0.0, overflow="drop"), seed=0)


def facts(trainer: PretrainingTrainer, args: PretrainArguments) -> dict:
    """What the model card says of the run."""
    training = trainer.args
    return {
        "data": ", ".join([args.dataset] if args.dataset else [source["path"] for source in args.sources]),
        "begun from": args.init_from or "fresh weights",
        "steps": trainer.state.global_step,
        "sequences a step": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "peak learning rate": training.learning_rate,
        "optimiser": "Muon" if args.muon else training.optim.value,
        "seed": training.seed,
    }


def main(args: PretrainArguments, objective: ObjectiveArguments, training: TrainingArguments) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one core; the others train
    torch.manual_seed(training.seed)
    config = AutoConfig.from_pretrained(args.model_config, use_cache=False)
    processor = build_processor(args, config)
    length = config.max_position_embeddings
    transform = CM3Transform(processor.tokenizer, config.vocabulary, length, **asdict(objective))
    set_accumulation(training, args.batch_tokens, length)
    model = build_model(args, config)
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=training_data(args, transform, training),
        eval_dataset=held_out(args, transform),
        data_collator=CausalCollator(pad_token_id=config.pad_token_id),
        optimizers=(muon(model, training) if args.muon else None, None),
        vocabulary=config.vocabulary,
        max_skipped_steps=args.max_skipped_steps,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    if trainer.stop.stopped:
        return
    measured = {}
    if trainer.eval_dataset is not None:
        measured = trainer.evaluate()
        print(f"held out: {measured}")
    save_model(trainer, processor, args.generation, args.max_shard_size)
    if args.card and trainer.is_world_process_zero():
        loss = {key: measured[key] for key in ("eval_loss",) if key in measured}
        write_card(training.output_dir, model.num_parameters(), facts(trainer, args), loss, **args.card)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((PretrainArguments, ObjectiveArguments, TrainingArguments)).parse_args_and_config())
