"""What a run leaves behind: a model folder that AutoModel, AutoProcessor and the pipeline load."""

import torch
from peft import PeftModel
from transformers import GenerationConfig, Trainer

from ..modeling_cm3leon import CM3LeonForCausalLM
from ..processing_cm3leon import CM3LeonProcessor
from .adapters import save_adapters


def save_tuned(
    trainer: Trainer, processor: CM3LeonProcessor, generation: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """Saves what was tuned: adapters alone where there are any (see [`save_adapters`]), else as [`save_model`]."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    generation = model.generation_config.to_diff_dict() | (generation or {})
    if not isinstance(model, PeftModel):
        save_model(trainer, processor, generation, max_shard_size)
    elif trainer.is_world_process_zero():
        save_adapters(model, processor, trainer.args.output_dir, generation)


def save_model(
    trainer: Trainer, processor: CM3LeonProcessor, generation: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """
    Saves the whole model in bfloat16, however many processes share it, with its processor, to the output folder.

    Args:
        trainer (`Trainer`): After training; its model carries no adapters.
        processor ([`CM3LeonProcessor`]): Goes into the folder with the model.
        generation (`dict`, *optional*): Generation defaults that differ from those of the model's configuration.
        max_shard_size (`str`): Largest file of the weights.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        config = trainer.accelerator.unwrap_model(trainer.model).config
        config.use_cache = True
        with torch.device("meta"):
            model = CM3LeonForCausalLM(config)
        model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig.from_model_config(config)
        model.generation_config.update(**generation or {})
        model.save_pretrained(trainer.args.output_dir, max_shard_size=max_shard_size)
        processor.save_pretrained(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
