"""Fine-tunes a CM3Leon on instruction rows with TRL's SFTTrainer: all weights, LoRA, or QLoRA.

    python recipes/sft/train.py --config recipes/sft/emoji.yaml
    python recipes/sft/train.py --config recipes/sft/emoji_lora.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/sft/train.py --config recipes/sft/7b.yaml

Every value of the YAML except `sources` and `generation` is a flag as well: those below, TRL's `SFTConfig`, and its
`ModelConfig` for the base, adapters and quantisation. The output folder is one that `pipeline("any-to-any")` loads. A
run that was stopped goes on from its last checkpoint, to the last bit as if it had not been.
"""

import os
from dataclasses import asdict, dataclass, field, replace

from transformers import AutoModelForCausalLM, AutoProcessor
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from cm3leon_hf import default_model
from cm3leon_hf.data.arguments import RowArguments, TransformArguments
from cm3leon_hf.data.pretraining import CM3Rows, fitting_rows
from cm3leon_hf.data.stream import PackedStream
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.adapters import TARGETS
from cm3leon_hf.training.batches import set_accumulation
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.instruction import InstructionTrainer
from cm3leon_hf.training.locations import order_locations
from cm3leon_hf.training.optimizers import muon
from cm3leon_hf.training.saving import save_tuned


@dataclass
class ObjectiveArguments(TransformArguments):
    answer_share: float = field(default=0.5, metadata={"help": "Share of rows whose output comes last, as in prompts."})
    whole_segment: float = field(default=0.5, metadata={"help": "Share of moved spans that are a whole text or image."})


@dataclass(kw_only=True)
class SFTArguments(RowArguments):
    eval_rows: int = field(default=1000, metadata={"help": "Rows to measure the loss on at most; 0 for all."})
    generation: dict = field(default_factory=dict, metadata={"help": "Generation defaults besides the base's."})
    muon: bool = field(default=False, metadata={"help": "Train the layers' matrices with Muon (timm) at this rate."})
    order_locations: bool = field(default=False, metadata={"help": "Begin with box coordinates that are in order."})
    packed: bool = field(default=False, metadata={"help": "Pack documents to max_length, apart; needs max_steps."})
    batch_tokens: int = field(default=0, metadata={"help": "Tokens of a batch; sets gradient_accumulation_steps."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps without finite gradient to skip at most."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the model's weights."})

    def __post_init__(self):
        super().__post_init__()
        if self.sources and not self.packed:
            raise ValueError("expected packed with sources, got packed: false; set it, or name a dataset")


def load_base(model_args: ModelConfig):
    """The model to start from, quantised if asked for; the shipped one by default."""
    quantization = get_quantization_config(model_args)
    return AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path or default_model(),
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **{"quantization_config": quantization} if quantization else {},
    )


def training_data(args: SFTArguments, transform: CM3Transform, training: SFTConfig) -> CM3Rows | PackedStream:
    """Packed sequences, or single documents."""
    rows = args.training_rows()
    if not args.packed:
        return CM3Rows(fitting_rows(rows, transform), transform, training.seed)
    process = (training.process_index, training.world_size)
    return PackedStream(rows, transform, args.window, training.seed, True, *process)


def held_out(args: SFTArguments, transform: CM3Transform) -> CM3Rows | None:
    rows = args.held_out_rows()
    transform = replace(transform, image_noise=0.0, overflow="drop")
    return None if rows is None else CM3Rows(fitting_rows(rows, transform), transform, seed=0)


def main(args: SFTArguments, objective: ObjectiveArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one core; the others train
    if args.muon and model_args.use_peft:
        raise ValueError("expected muon or use_peft, got both; Muon is for whole matrices, leave it out")
    if args.order_locations and model_args.use_peft:
        raise ValueError("expected order_locations or use_peft, got both; adapters leave embeddings as they are")
    model = load_base(model_args)
    if args.order_locations:
        order_locations(model)
    processor, config = AutoProcessor.from_pretrained(model.name_or_path, device="cpu"), model.config
    length = min(training.max_length or config.max_position_embeddings, config.max_position_embeddings)
    transform = CM3Transform(
        processor.tokenizer,
        config.vocabulary,
        length,
        completion_only_loss=bool(training.completion_only_loss),
        **asdict(objective),
    )
    set_accumulation(training, args.batch_tokens, length)
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    model_args.lora_target_modules = model_args.lora_target_modules or TARGETS
    trainer = InstructionTrainer(
        model=model,
        args=training,
        train_dataset=training_data(args, transform, training),
        eval_dataset=held_out(args, transform),
        processing_class=processor.tokenizer,
        peft_config=get_peft_config(model_args),
        optimizers=(muon(model, training) if args.muon else None, None),
        max_skipped_steps=args.max_skipped_steps,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    if trainer.stop.stopped:
        return
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        print(f"held out: {metrics}")
    save_tuned(trainer, processor, args.generation, args.max_shard_size)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    kinds = (SFTArguments, ObjectiveArguments, SFTConfig, ModelConfig)
    main(*TrlParser(kinds).parse_args_and_config())
