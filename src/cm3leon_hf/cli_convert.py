"""`cm3leon convert`: other people's weights in."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Checkpoint: its file, or a folder with one or with shards.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="taming, gumbel, chameleon, llamagen or opt. Told by the weights when left out.", show_default=False
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="VQGANs: side of the pictures in pixels, 384 for Janus. 512 for chameleon, else 256, when left out.",
            show_default=False,
        ),
    ] = None,
    without_decoder: Annotated[
        bool, typer.Option("--without-decoder", help="VQGANs: accept one that cannot draw, as transformers' Chameleon.")
    ] = False,
    plain_codebook: Annotated[
        bool,
        typer.Option("--plain-codebook", help="llamagen: trained with codebook_l2_norm=False, unlike the published."),
    ] = False,
    vqgan: Annotated[
        Path | None,
        typer.Option(
            help="OPT: converted VQGAN whose codes become image ids. 8192 codes, 32×32, when left out.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="OPT: float32, bfloat16 or float16.")] = "float32",
):
    """
    Convert weights of others.

    Image tokenizers become a folder for `CM3LeonVQGAN.from_pretrained`: VQGANs of taming-transformers (`taming`, and
    `gumbel` with 8192 codes for 8×8 pixels), of Meta's Chameleon and Anole (`chameleon`), of LlamaGen and Janus
    (`llamagen`). Their codes and pictures are the original's. OPT (`opt`, all sizes but 350M) becomes a decoder for
    `AutoModelForCausalLM.from_pretrained`, which begins with OPT's knowledge of text and has to learn pictures.

    Prints what was read, unused and missing, and writes it to `OUT/conversion.json`. Pickled checkpoints with anything
    but tensors in them are refused, because loading them would run code. The weights keep their licence.

    **Examples**

    `cm3leon convert vqgan_gumbel_f8/last.ckpt vqgan-f8`

    `cm3leon convert chameleon/tokenizer/vqgan.ckpt vqgan-chameleon --resolution 256`

    `hf download facebook/opt-125m --local-dir opt-125m`

    `cm3leon convert opt-125m cm3leon-opt-125m --vqgan vqgan-f8`
    """
    from transformers.utils import logging

    from .conversion.convert import convert

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(convert(source, out, kind, resolution, without_decoder, vqgan, dtype, plain_codebook))
    print(out)
