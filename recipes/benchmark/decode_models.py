"""The models that decode.py measures: ours, and its peers in transformers of the same shape, with random weights."""

import gc
import tempfile

import torch
from decode_rows import DecodeArguments, Row
from transformers import JanusConfig, JanusForConditionalGeneration, OPTConfig, OPTForCausalLM, TorchAoConfig

from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM, optimize_for_cpu


def our_config(args: DecodeArguments) -> CM3LeonConfig:
    sizes = {
        "350M": {},
        "7B": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
        "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    return CM3LeonConfig(image_grid_size=args.grid, zero_init="none", **sizes[args.shape])


def shared_sizes(config: CM3LeonConfig) -> dict:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {name: getattr(config, name) for name in names}


def opt_config(config: CM3LeonConfig) -> OPTConfig:
    return OPTConfig(
        **shared_sizes(config),
        word_embed_proj_dim=config.hidden_size,
        ffn_dim=config.intermediate_size,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    )


def janus_config(config: CM3LeonConfig) -> JanusConfig:
    """Its gated MLP has three matrices, so it gets two thirds of the width: as many weights."""
    heads, width = config.num_attention_heads, config.hidden_size
    mlp = {"intermediate_size": config.intermediate_size * 2 // 3}
    text = {"model_type": "llama", "num_key_value_heads": heads} | mlp | shared_sizes(config)
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": width}
    vision |= {"num_image_tokens": config.image_grid_size**2}
    vq = {"num_embeddings": config.image_vocab_size, "image_token_embed_dim": width, "projection_dim": width}
    vq |= {"num_patches": config.image_grid_size, "base_channels": 32, "channel_multiplier": [1, 1]}
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq)


def build(row: Row, args: DecodeArguments):
    """The model of a row with random weights, on the accelerator when there is one, else optimized for the CPU."""
    torch.manual_seed(0)
    config, accelerator = our_config(args), torch.accelerator.current_accelerator(check_available=True)
    if row.model == "stock":
        model = OPTForCausalLM(opt_config(config))
    elif row.model == "Janus":
        model = JanusForConditionalGeneration(janus_config(config))
        model.generation_config.generation_kwargs = {"boi_token_id": 2}
        model.generation_config.update(bos_token_id=1, pad_token_id=0)
    else:
        model = CM3LeonForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    if row.weights != "bf16":
        model = quantised(model, row.weights)
    if accelerator:
        return model.to(accelerator)
    if row.model != "ours" or "as loaded" in row.options:
        return model
    return optimize_for_cpu(model, compiled="compiled" in row.options)


def quantised(model, weights: str):
    """As a user does it: saved, and loaded with a quantization_config."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()
        return CM3LeonForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization(weights)
        )


def quantization(weights: str) -> TorchAoConfig:
    """int4 has a layout of its own for each kind of device: this one for CPUs is unpacked until it is optimized."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if weights == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if torch.accelerator.is_available():
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(128)))
