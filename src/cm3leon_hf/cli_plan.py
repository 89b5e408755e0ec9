"""`cm3leon plan`: what a training run needs."""

from typing import Annotated

import typer


def plan(
    config: Annotated[str, typer.Option(help="Folder with a model's config.json, such as recipes/pretrain/350m.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")],
    gpu: Annotated[str, typer.Option(help="Their kind: a100, a100-40gb, b200, h100, h200, l4, mi300x.")] = "h100",
    tokens: Annotated[float, typer.Option(help="Tokens to train on.")] = 1.4e12,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 2**23,
    utilization: Annotated[float, typer.Option(help="Share of the GPUs' rate that training reaches.")] = 0.4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank in place of all weights.", show_default=False)
    ] = None,
    four_bit: Annotated[bool, typer.Option("--four-bit", help="QLoRA: over weights of 4 bits.")] = False,
):
    """
    Say what a training run needs before it is paid for.

    Prints parameters, FLOPs, a layout that fits with the memory it takes on each GPU, steps, days and GPU-hours.

    **Example**

    `cm3leon plan --config recipes/pretrain/7b --gpus 512 --gpu a100 --tokens 2.4e12`

    `cm3leon plan --config recipes/pretrain/7b --gpus 1 --gpu l4 --batch-tokens 65536 --lora-rank 64 --four-bit`
    """
    from transformers import AutoConfig

    from . import planning

    if gpu not in planning.GPUS:
        raise ValueError(f"expected a GPU among {', '.join(planning.GPUS)}, got {gpu!r}")
    if four_bit and lora_rank is None:
        raise ValueError("expected --lora-rank with --four-bit, which freezes the weights, got none; set it")
    adapters = None if lora_rank is None else planning.Adapters(lora_rank, four_bit)
    made = planning.plan(
        AutoConfig.from_pretrained(config), gpus, planning.GPUS[gpu], tokens, batch_tokens, utilization, adapters
    )
    print(planning.describe(made, tokens, gpus, gpu))
