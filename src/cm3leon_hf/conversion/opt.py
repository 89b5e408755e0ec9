"""OPT's weights as a start of the decoder: the same function of text, with image ids behind the text's."""

from pathlib import Path

import torch
from transformers import OPTConfig, PreTrainedTokenizerFast

from ..configuration_cm3leon import CM3LeonConfig
from ..modeling_cm3leon import CM3LeonForCausalLM
from .opt_tokenizer import convert_tokenizer, read_tokenizer
from .report import ConversionReport, by_prefix

OFFSET = 2  # OPT counts positions from 2
MULTIPLE = 64  # of text ids, so that the embedding shards evenly


def is_opt(weights: dict[str, torch.Tensor]) -> bool:
    names = (
        "decoder.embed_positions.weight",
        "decoder.layers.0.self_attn.q_proj.weight",
        "decoder.layers.0.fc1.weight",
    )
    return all(any(name.endswith(wanted) for name in weights) for wanted in names)


def convert_opt(
    weights: dict[str, torch.Tensor],
    folder: Path,
    image_vocab_size: int = 8192,
    image_grid_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[CM3LeonForCausalLM, PreTrainedTokenizerFast, ConversionReport]:
    """
    Builds the decoder that computes OPT's logits for the same text, and the tokenizer with its ids.

    The special tokens come first among the text ids (OPT's `</s>` becomes `<eos>`), then OPT's other tokens in their
    order. Gains and biases of the layers' norms are folded into the projections behind them. New rows of the embedding
    are drawn from a normal distribution with the mean and deviation of OPT's (Hewitt 2021, per dimension), always the
    same.

    Args:
        weights (`dict[str, torch.Tensor]`): OPT's weights by their names.
        folder (`Path`): Folder with OPT's `config.json` and tokenizer.
        image_vocab_size (`int`): Codes of the VQGAN.
        image_grid_size (`int`): Codes along one side of an image.
        dtype (`torch.dtype`): Type of the weights; folding is done in float32.

    Raises:
        ValueError: if the model is not OPT, a variant that the decoder cannot express (350M's), too short for an image,
            or if weights are missing.
    """
    opt = read_config(folder)
    if image_grid_size**2 >= opt.max_position_embeddings:
        raise ValueError(
            f"expected fewer than {opt.max_position_embeddings} tokens to an image, got {image_grid_size**2}; take a "
            "VQGAN with a coarser grid, or convert it at a lower resolution"
        )
    tokenizer, source_ids = convert_tokenizer(read_tokenizer(folder), opt.max_position_embeddings)
    source_ids += [-1] * (-len(source_ids) % MULTIPLE)
    parts, unused = separate(weights, opt)
    check_tokenizer(source_ids, parts["model.embed_tokens.weight"])
    ours = decoder_weights(parts, opt, source_ids, image_vocab_size)
    config = CM3LeonConfig(
        text_vocab_size=len(source_ids),
        image_vocab_size=image_vocab_size,
        image_grid_size=image_grid_size,
        hidden_size=opt.hidden_size,
        intermediate_size=opt.ffn_dim,
        num_hidden_layers=opt.num_hidden_layers,
        num_attention_heads=opt.num_attention_heads,
        hidden_act=opt.activation_function,
        max_position_embeddings=opt.max_position_embeddings,
        tie_word_embeddings=opt.tie_word_embeddings,
        **needed_fields(ours),
    )
    new = sum(index < 0 for index in source_ids)
    notes = [
        f"{new} text ids and {image_vocab_size} image ids are new, their rows drawn like OPT's",
        f"gains of the layers' norms folded; use_bias {config.use_bias}, layer_norm_affine {config.layer_norm_affine}",
    ]
    return build(config, ours, dtype), tokenizer, ConversionReport("opt", len(parts), by_prefix(unused), [], notes)


def decoder_weights(
    parts: dict[str, torch.Tensor], opt: OPTConfig, source_ids: list[int], image_vocab_size: int
) -> dict[str, torch.Tensor]:
    """OPT's weights under our names to those of the decoder, in float32."""
    ours = fold_norms({name: weight.float() for name, weight in parts.items()}, opt.num_hidden_layers)
    ours["model.embed_positions.weight"] = ours["model.embed_positions.weight"][OFFSET:]
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not opt.tie_word_embeddings):
        ours[name] = extend(ours[name], source_ids, image_vocab_size)
    return ours


def build(config: CM3LeonConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> CM3LeonForCausalLM:
    """The model, from those of the weights that it has; the others are zeros or ones that do nothing."""
    with torch.device("meta"):
        model = CM3LeonForCausalLM(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # a tied head is no second one
    other = [name for name, shape in shapes.items() if weights[name].shape != shape]
    if other:
        raise ValueError(
            f"expected weights of the sizes that config.json says, {other[0]} is {tuple(weights[other[0]].shape)} "
            f"instead of {tuple(shapes[other[0]])}; take config and weights of one model"
        )
    model.load_state_dict({name: weights[name].to(dtype) for name in shapes}, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def read_config(folder: Path) -> OPTConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected OPT's config.json and tokenizer beside its weights, got none in {folder}")
    values, _ = OPTConfig.get_config_dict(folder)
    if values.get("model_type") != "opt":
        raise ValueError(f"expected a config.json of OPT, got one of {values.get('model_type')!r}; only OPT converts")
    opt = OPTConfig.from_pretrained(folder)
    differences = {
        "do_layer_norm_before=False": not opt.do_layer_norm_before,
        f"word_embed_proj_dim={opt.word_embed_proj_dim}": opt.word_embed_proj_dim != opt.hidden_size,
        "_remove_final_layer_norm=True": opt._remove_final_layer_norm,
    }
    found = [name for name, differs in differences.items() if differs]
    if found:
        raise ValueError(
            f"expected norms before each block and embeddings of width {opt.hidden_size}, got {', '.join(found)}, as "
            "OPT-350M has it; take another size, such as OPT-125M or OPT-1.3B"
        )
    return opt


def separate(weights: dict[str, torch.Tensor], opt: OPTConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """OPT's weights under our names, and the names of all others."""
    anchor = "decoder.embed_tokens.weight"
    prefix = next((name.removesuffix("embed_tokens.weight") for name in weights if name.endswith(anchor)), "decoder.")
    expected = [f"{name}.weight" for name in ("embed_tokens", "embed_positions")]
    kinds = ["weight"] + ["bias"] * opt.enable_bias
    norm_kinds = ["weight", "bias"] * opt.layer_norm_elementwise_affine
    expected += [f"final_layer_norm.{kind}" for kind in norm_kinds]
    projections = [f"self_attn.{name}_proj" for name in "qkv"] + ["self_attn.out_proj", "fc1", "fc2"]
    of_layer = [f"{name}.{kind}" for name in projections for kind in kinds]
    of_layer += [f"{name}.{kind}" for name in ("self_attn_layer_norm", "final_layer_norm") for kind in norm_kinds]
    expected += [f"layers.{i}.{name}" for i in range(opt.num_hidden_layers) for name in of_layer]
    homes = {f"model.{name}": prefix + name for name in expected}
    if not opt.tie_word_embeddings:
        homes["lm_head.weight"] = "lm_head.weight"
    missing = [home for home in homes.values() if home not in weights]
    if missing:
        raise ValueError(f"expected all of OPT's weights, {len(missing)} are missing, such as {missing[0]}")
    used = set(homes.values())
    return {ours: weights[home] for ours, home in homes.items()}, [name for name in weights if name not in used]


def check_tokenizer(source_ids: list[int], rows: torch.Tensor) -> None:
    if max(source_ids) >= len(rows):
        raise ValueError(
            f"expected a tokenizer with ids below {len(rows)}, got {max(source_ids)}; take the model's own"
        )


def fold_norms(parts: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """
    Moves each layer's gains and biases of norms into the projections that read the norms.

    `W (g x + b) + c = (W g) x + (W b + c)`, and a key's bias adds the same to all scores of a query, so it is left out.
    """
    folded = dict(parts)
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        for norm, readers in (
            ("self_attn_layer_norm", [f"self_attn.{name}_proj" for name in "qkv"]),
            ("final_layer_norm", ["fc1"]),
        ):
            gain, shift = (folded.pop(f"{layer}{norm}.{kind}", None) for kind in ("weight", "bias"))
            for reader in (f"{layer}{name}" for name in readers):
                weight = folded[f"{reader}.weight"]
                bias = folded.get(f"{reader}.bias", torch.zeros(len(weight)))
                folded[f"{reader}.bias"] = bias if shift is None else bias + weight @ shift
                folded[f"{reader}.weight"] = weight if gain is None else weight * gain
        folded[f"{layer}self_attn.k_proj.bias"] = torch.zeros(len(folded[f"{layer}self_attn.k_proj.weight"]))
        for name in ("self_attn.out_proj", "fc2"):
            folded.setdefault(f"{layer}{name}.bias", torch.zeros(len(folded[f"{layer}{name}.weight"])))
    return folded


def needed_fields(weights: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Whether biases, and the final norm's gain and bias, do anything: fields of the configuration."""
    gain, shift = (weights.get(f"model.final_layer_norm.{kind}") for kind in ("weight", "bias"))
    biases = [weight for name, weight in weights.items() if name.endswith(("proj.bias", "fc1.bias", "fc2.bias"))]
    return {
        "use_bias": any(bias.any() for bias in biases),
        "layer_norm_affine": gain is not None and bool((gain != 1).any() or shift.any()),
    }


def extend(rows: torch.Tensor, source_ids: list[int], image_vocab_size: int) -> torch.Tensor:
    """`(opt_ids, width)` rows in the order of the new text ids, -1 for new ones, and then those of the image ids."""
    ids = torch.tensor(source_ids + [-1] * image_vocab_size)
    noise = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(0))
    drawn = rows.mean(0) + rows.std(0) * noise
    return torch.where(ids[:, None] >= 0, rows[ids.clamp_min(0)], drawn)
