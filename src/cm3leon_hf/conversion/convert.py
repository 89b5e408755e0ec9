"""Converts a checkpoint of others to a folder that `from_pretrained` loads."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..images import default_image_processor
from ..modeling_vqgan import CM3LeonVQGAN
from ..processing_cm3leon import CM3LeonProcessor
from .checkpoints import read_weights
from .opt import convert_opt, is_opt
from .report import ConversionReport, by_prefix, in_words
from .vqgan import RESOLUTIONS, convert_vqgan, vqgan_kind

KINDS = (*RESOLUTIONS, "opt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "conversion.json"


def convert(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    resolution: int | None = None,
    without_decoder: bool = False,
    vqgan: str | Path | None = None,
    dtype: str = "float32",
    plain_codebook: bool = False,
) -> ConversionReport:
    """
    Converts a VQGAN or OPT, and writes what was done with each weight to `conversion.json` beside the result.

    Args:
        source (`str` or `Path`): The checkpoint's file or folder; for OPT the folder with config and tokenizer.
        out (`str` or `Path`): A new or empty folder.
        kind (`str`, *optional*): `"taming"`, `"gumbel"`, `"chameleon"`, `"llamagen"` or `"opt"`; found by the names of
            the weights if left out.
        resolution, without_decoder: For VQGANs, as in [`~cm3leon_hf.conversion.vqgan.convert_vqgan`].
        vqgan (`str` or `Path`, *optional*): For OPT, the folder of a [`CM3LeonVQGAN`] whose codes become image ids; the
            result then has a processor too. Without it there are 8192 image ids in a grid of 32, the paper's.
        dtype (`str`): For OPT, type of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        plain_codebook (`bool`): For LlamaGen, as in [`~cm3leon_hf.conversion.vqgan.convert_vqgan`].

    Raises:
        ValueError: for a folder in use, an option that the kind does not have, or as the parts that read and convert.
    """
    source, out = Path(source), Path(out)
    check_arguments(out, kind, dtype)
    weights = read_weights(source)
    kind = checked_kind(weights, kind)
    if kind != "llamagen":
        refuse(kind, plain_codebook=plain_codebook)
    if kind == "opt":
        refuse(kind, resolution=resolution, without_decoder=without_decoder)
        report = save_opt(weights, source if source.is_dir() else source.parent, out, vqgan, DTYPES[dtype])
    else:
        refuse(kind, vqgan=vqgan, dtype=dtype != "float32")
        model, report = convert_vqgan(weights, kind, resolution, without_decoder, plain_codebook)
        model.save_pretrained(out)
        default_image_processor(model.config).save_pretrained(out)
    (out / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def save_opt(weights: dict, folder: Path, out: Path, vqgan: str | Path | None, dtype: torch.dtype) -> ConversionReport:
    image_tokenizer = CM3LeonVQGAN.from_pretrained(vqgan, dtype=torch.float32) if vqgan is not None else None
    sizes = {}
    if image_tokenizer is not None:
        codes = image_tokenizer.config
        sizes = {"image_vocab_size": codes.num_embeddings, "image_grid_size": codes.grid_size}
    model, tokenizer, report = convert_opt(weights, folder, dtype=dtype, **sizes)
    model.save_pretrained(out)
    if image_tokenizer is None:
        tokenizer.save_pretrained(out)
    else:
        images = default_image_processor(image_tokenizer.config)
        text_size = model.config.text_vocab_size
        CM3LeonProcessor(images, tokenizer, image_tokenizer, text_vocab_size=text_size, **sizes).save_pretrained(out)
    return report


def check_arguments(out: Path, kind: str | None, dtype: str) -> None:
    if kind not in (None, *KINDS):
        raise ValueError(f"expected a kind among {', '.join(KINDS)}, got {kind!r}; or leave it out")
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, got {out}; name another")


def checked_kind(weights: dict[str, torch.Tensor], wanted: str | None) -> str:
    """The kind that the names of the weights tell; taming's and Chameleon's names are the same."""
    found = "opt" if is_opt(weights) else vqgan_kind(weights)
    if found is None:
        raise ValueError(f"expected weights of {', '.join(KINDS)}, got others: {in_words(by_prefix(weights))[:200]}")
    if wanted not in (None, found) and {wanted, found} != {"taming", "chameleon"}:
        raise ValueError(f"expected the weights of {wanted}, got those of {found}; leave the kind out")
    return wanted or found


def refuse(kind: str, **options) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"expected no {name} for {kind}, got one; leave it out")
