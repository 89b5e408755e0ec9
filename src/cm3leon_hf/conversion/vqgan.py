"""VQGANs of others to ours: taming-transformers' (plain and Gumbel), Meta Chameleon's, LlamaGen's."""

import re

import torch
import torch.nn.functional as F

from ..configuration_vqgan import CM3LeonVQGANConfig
from ..modeling_vqgan import CM3LeonVQGAN
from .report import ConversionReport, by_prefix

PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
RESOLUTIONS = {"taming": 256, "gumbel": 256, "chameleon": 512, "llamagen": 256}  # of the published ones
STATISTICS = "quantize.codebook_used"  # of LlamaGen's training
CODEBOOK = "quantize.embedding.weight"


def vqgan_kind(weights: dict[str, torch.Tensor]) -> str | None:
    """
    Whose VQGAN these weights are, or `None` if they are none.

    Raises:
        ValueError: if they are an autoencoder's without a codebook.
    """

    def has(pattern: str) -> bool:
        return any(re.search(rf"(^|\.){pattern}", name) for name in weights)

    blocks, plain = has(r"encoder\.conv_blocks\.0\.res\.0\."), has(r"encoder\.down\.0\.block\.0\.")
    if not blocks and not plain:
        return None
    if not has(r"quantize\.embed(ding)?\.weight$"):
        raise ValueError("expected a VQGAN, got an autoencoder without a codebook (quantize.embedding.weight)")
    if blocks:
        return "llamagen"
    if has(r"quantize\.proj\."):
        return "gumbel"
    # of the published ones, only Chameleon's has attention nowhere but in the middle
    return "taming" if has(r"encoder\.down\.\d+\.attn\.") else "chameleon"


def convert_vqgan(
    weights: dict[str, torch.Tensor],
    kind: str,
    resolution: int | None = None,
    without_decoder: bool = False,
    plain_codebook: bool = False,
) -> tuple[CM3LeonVQGAN, ConversionReport]:
    """
    Builds the VQGAN whose codes and pictures are those of the original.

    Args:
        weights (`dict[str, torch.Tensor]`): The original's weights by their names, possibly among others.
        kind (`str`): `"taming"`, `"gumbel"`, `"chameleon"` or `"llamagen"`.
        resolution (`int`, *optional*): Pixels along one side of the pictures; weights do not tell. By default that of
            the published models: 512 for Chameleon, otherwise 256.
        without_decoder (`bool`): Whether to accept weights without a decoder, as transformers' Chameleon has them: the
            result turns pictures into codes, and draws grey.
        plain_codebook (`bool`): Whether LlamaGen's was trained with `codebook_l2_norm=False`, which its weights do not
            tell: codes are then the nearest vectors as they stand. All published ones, Janus' too, were trained with.

    Returns:
        The VQGAN in float32, and what was done with each weight.

    Raises:
        ValueError: if the architecture differs, naming the weights by which it does.
    """
    own, unused = separate(weights)
    notes = []
    if kind == "llamagen":
        own = rename_llamagen(own)
        if plain_codebook:
            notes.append("codebook taken as it stands, for codebook_l2_norm=False")
        else:  # nearest by angle: the length of a latent changes no argmax once all codes have the same
            own[CODEBOOK] = F.normalize(own[CODEBOOK].float(), dim=-1)
            notes.append("codebook normalised to length 1, as the original does at each look-up")
            notes.append("a further training does not normalise latents")
    elif kind == "gumbel":
        own = {name.replace("quantize.embed.", "quantize.embedding."): weight for name, weight in own.items()}
        notes.append("codes are the argmax of the logits, without noise")
    own = {name: weight.float() for name, weight in highest_resolution_first(own).items()}
    config = infer_config(own, kind, resolution or RESOLUTIONS[kind])
    with torch.device("meta"):
        vqgan = CM3LeonVQGAN(config)
    missing = check_fit(own, vqgan, without_decoder)
    read = len(own)
    own["quantize.rates"] = torch.zeros(config.num_embeddings)
    own |= {name: torch.zeros(vqgan.state_dict()[name].shape) for name in missing}
    vqgan.load_state_dict(own, assign=True)
    return vqgan.eval(), ConversionReport(kind, read, by_prefix(unused), missing, notes)


def separate(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The VQGAN's weights, by their names within it, and the names of all others."""
    anchor = "encoder.conv_in.weight"
    prefixes = [name.removesuffix(anchor) for name in weights if re.search(rf"(^|\.){re.escape(anchor)}$", name)]
    if len(prefixes) != 1:
        raise ValueError(f"expected one VQGAN with {anchor}, got {prefixes or 'none'}; save the wanted one on its own")
    inner = {name: name.removeprefix(prefixes[0]) for name in weights if name.startswith(prefixes[0])}
    inner = {name: part for name, part in inner.items() if part.startswith(PARTS) and part != STATISTICS}
    return {part: weights[name] for name, part in inner.items()}, [name for name in weights if name not in inner]


def rename_llamagen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LlamaGen's names to taming's."""
    renamed = {}
    for name, weight in weights.items():
        name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
        name = re.sub(r"^decoder\.conv_blocks\.", "decoder.up.", name)
        name = re.sub(r"\.(down|up)\.(\d+)\.res\.", r".\1.\2.block.", name)
        for number, middle in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{number}.", f".mid.{middle}.")
        renamed[name] = weight
    return renamed


def highest_resolution_first(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Counts the decoder's levels as taming does; LlamaGen and some ports count in the order of use."""
    if "decoder.up.0.upsample.conv.weight" not in weights:  # the highest resolution alone is not upsampled
        return weights
    last = max(int(match[1]) for name in weights if (match := re.match(r"decoder\.up\.(\d+)\.", name)))
    return {
        re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name): weight
        for name, weight in weights.items()
    }


def infer_config(weights: dict[str, torch.Tensor], kind: str, resolution: int) -> CM3LeonVQGANConfig:
    """The sizes that the weights' shapes tell."""
    codebook, first = weights[CODEBOOK], weights["encoder.conv_in.weight"]
    if first.shape[1] != 3:
        raise ValueError(f"expected a VQGAN of RGB pictures, got one of {first.shape[1]} channels, of segmentations?")
    widths = []
    while (block := weights.get(f"encoder.down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(block.shape[0])
    blocks = {name.split(".")[4] for name in weights if name.startswith("encoder.down.0.block.")}
    attended = [i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in weights]
    return CM3LeonVQGANConfig(
        resolution=resolution,
        in_channels=first.shape[1],
        base_channels=first.shape[0],
        channel_multiplier=[width // first.shape[0] for width in widths],
        num_res_blocks=len(blocks),
        attn_resolutions=[resolution // 2**i for i in attended],
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        embed_dim=codebook.shape[1],
        num_embeddings=codebook.shape[0],
        gumbel=kind == "gumbel",
    )


def check_fit(weights: dict[str, torch.Tensor], vqgan: CM3LeonVQGAN, without_decoder: bool) -> list[str]:
    """The decoder's names if it is missing and may be; everything else must be there, and nothing more."""
    expected = {name: tuple(weight.shape) for name, weight in vqgan.state_dict().items() if name != "quantize.rates"}
    got = {name: tuple(weight.shape) for name, weight in weights.items()}
    decoder = [name for name in expected if name.startswith("decoder.")]
    if not any(name.startswith("decoder.") for name in got):
        if not without_decoder:
            raise ValueError(
                "expected a decoder, got an encoder alone, as transformers' Chameleon has it; convert the original's "
                "tokenizer/vqgan.ckpt, or accept a VQGAN that cannot draw with --without-decoder"
            )
        expected = {name: shape for name, shape in expected.items() if name not in decoder}
    else:
        decoder = []
    lacks = [f"{name} is missing" for name in expected.keys() - got.keys()]
    adds = [f"{name} is unknown" for name in got.keys() - expected.keys()]
    other = [
        f"{name} is {got[name]} instead of {shape}" for name, shape in expected.items() if got.get(name, shape) != shape
    ]
    differences = sorted(lacks) + sorted(adds) + other
    if differences:
        shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
        raise ValueError(
            f"expected a VQGAN with taming's architecture, got one that differs in {len(differences)} weights: {shown}"
        )
    return decoder
