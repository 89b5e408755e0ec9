"""The command line: `cm3leon generate` draws, `describe` captions; `plan`, `compare`, `convert`, `export` help."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_compare import compare
from .cli_convert import convert
from .cli_export import export

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it warns whenever transformers imports torchao

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="CM3Leon: one model that draws pictures from text and describes pictures in text.",
)


class Strategy(str, Enum):
    cfg = "cfg"
    cd_k = "cd-k"
    both = "both"


Model = Annotated[
    str | None,
    typer.Option(help="Model folder or hub name. The shipped emoji model when left out.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Seed; the same seed draws the same pictures.", show_default=False)]


@app.command()
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several prompts, several rows.")
    ],
    model: Model = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 4,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How closely to follow the text; 1 turns it off.")] = 3.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample among the likeliest tokens up to this sum.")] = 0.9,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1 is safer, above 1 more varied.")] = 1.0,
    strategy: Annotated[
        Strategy, typer.Option(help="Guidance with top-p, contrastive decoding (CD-K), or half of each.")
    ] = Strategy.cfg,
    contrastive_alpha: Annotated[float, typer.Option(help="CD-K: smaller keeps more tokens, in (0, 1].")] = 0.1,
    contrastive_k: Annotated[int, typer.Option(min=1, help="CD-K: 1 is plain contrastive decoding.")] = 8,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many for each prompt and keep the best by CLIP.", show_default=False),
    ] = None,
    retrieve: Annotated[
        int, typer.Option(min=0, max=2, help="Put so many retrieved documents in front of each prompt.")
    ] = 0,
    show_retrieved: Annotated[
        bool, typer.Option("--show-retrieved", help="Show in the grid what was retrieved.")
    ] = False,
    bank: Annotated[
        str | None,
        typer.Option(help="Memory bank to retrieve from. The shipped one when left out.", show_default=False),
    ] = None,
    clip_model: Annotated[
        str | None,
        typer.Option(
            help="CLIP of open_clip that ranks candidates and retrieves. The shipped one when left out.",
            show_default=False,
        ),
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="Name or file of its weights, such as `openai`.", show_default=False)
    ] = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("cm3leon-out"),
):
    """
    Draw pictures from text.

    Writes `grid.png`, with a row of pictures under each prompt, and the single pictures `00.png`, `01.png`, … into the
    folder, and prints their paths.

    The shipped model draws emoji in four styles: `fluent 3d`, `fluent flat`, `noto` and `twemoji`.

    **Examples**

    `cm3leon generate "red apple, fluent 3d style"`

    `cm3leon generate "cat face, noto style" "rocket, twemoji style" --num-images 8 --seed 1`

    `cm3leon generate "rocket, twemoji style" --candidates 8 --strategy both --num-images 2`

    `cm3leon generate "sloth, twemoji style" --retrieve 2 --show-retrieved`
    """
    with errors_in_one_line():
        from .evaluation.reranking import draw_candidates, rank
        from .grid import draw_grid
        from .progress import TokenProgress

        if candidates is not None and candidates < num_images:
            raise ValueError(f"expected at least {num_images} candidates to keep as many, got {candidates}; draw more")
        scorer = load_clip(clip_model, clip_weights) if candidates is not None or retrieve else None
        retrieved = find_documents(prompts, retrieve, bank, scorer) if retrieve else None
        model, processor = load(model, seed)
        cfg = {"guidance_scale": guidance_scale, "top_p": top_p}
        cd_k = {"contrastive_alpha": contrastive_alpha, "contrastive_k": contrastive_k}
        strategies = {"cfg": [cfg], "cd-k": [cd_k], "both": [cfg, cd_k]}[strategy.value]
        length = processor.vocabulary.image_length
        pools = draw_candidates(
            model,
            processor,
            prompts,
            candidates or num_images,
            strategies,
            retrieved=retrieved,
            temperature=temperature,
            streamer=lambda: TokenProgress(length, "drawing"),
        )
        if candidates is not None:
            pools = rank(pools, prompts, scorer, keep=num_images)
        cells = grid_cells(prompts, pools, retrieved if show_retrieved else None, processor)
        grid = draw_grid(*zip(*(cell for row in cells for cell in row)), columns=len(cells[0]))
        drawn = [candidate.image for pool in pools for candidate in pool]
        save({"grid": grid} | {f"{index:02d}": image for index, image in enumerate(drawn)}, out)


def grid_cells(prompts: list[str], pools: list[list], retrieved: list[list[dict]] | None, processor) -> list[list]:
    """For each prompt a row of pictures with labels: what was retrieved for it, if that is to be seen, comes first."""
    rows = [
        [(one.image, label(prompt, at, one)) for at, one in enumerate(pool)] for prompt, pool in zip(prompts, pools)
    ]
    if retrieved is None:
        return rows
    from .retrieval.documents import document_cells

    return [shown + row for shown, row in zip(document_cells(retrieved, processor), rows)]


def label(prompt: str, rank: int, candidate) -> str:
    """The prompt above its first picture, and each picture's score where there is one."""
    score = "" if candidate.score is None else f"{candidate.score:.3f}"
    return " · ".join(part for part in ("" if rank else prompt, score) if part)


@app.command()
def describe(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's path or address.")],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest description, in tokens.")] = 64,
    seed: Seed = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw a description instead of the likeliest one.")] = False,
):
    """
    Say what is in a picture.

    **Example**

    `cm3leon describe apple.png`
    """
    with errors_in_one_line():
        model, processor = load(model, seed)
        inputs = processor.for_image_to_text(image)
        ids = model.generate(**inputs, generation_mode="text", do_sample=sample, max_new_tokens=max_new_tokens)
        new = ids[:, inputs["input_ids"].shape[1] :]
        print(processor.post_process_multimodal_output(new, generation_mode="text")[0].strip())


@app.command()
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
    with errors_in_one_line():
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


def load_clip(model: str | None, weights: str | None):
    """The CLIP, the shipped one by default; it scores pictures and retrieves."""
    try:
        from .evaluation.clip_score import CLIPScorer
        from .shipped import default_clip

        return CLIPScorer(model or default_clip(), weights)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"expected a CLIP to rank candidates and retrieve, got {error}") from error


def find_documents(prompts: list[str], count: int, folder: str | None, encoder) -> list[list[dict]]:
    """What the bank, the shipped one by default, has for each prompt."""
    from .retrieval.augmenter import RetrievalAugmenter
    from .retrieval.memory_bank import MemoryBank
    from .shipped import default_bank

    bank = MemoryBank.load(folder or default_bank(), encoder.name)
    return RetrievalAugmenter(bank, encoder, training=False).for_prompts(prompts, count)


def load(path: str | None, seed: int | None):
    """The model, on the accelerator or optimized for the CPU, and its processor; seeds torch when asked to."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
    from transformers.utils import logging

    from .cpu_inference import optimize_for_cpu
    from .shipped import default_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if seed is not None:
        set_seed(seed)
    path = path or default_model()
    processor = AutoProcessor.from_pretrained(path)
    model = (
        load_merged(path) if Path(path, "adapter_config.json").is_file() else AutoModelForCausalLM.from_pretrained(path)
    )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator) if accelerator else optimize_for_cpu(model), processor


def load_merged(folder: str):
    """The base of these adapters with the adapters in its weights."""
    try:
        from .training.adapters import load_adapters
    except ImportError as error:
        raise ValueError(f"expected what adapters need, got {error}; pip install 'cm3leon_hf[train]'") from error
    return load_adapters(folder).merge_and_unload()


def save(images: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        path = folder / f"{name}.png"
        image.save(path)
        print(path)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend is said in one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


app.command()(errors_in_one_line()(compare))
app.command()(errors_in_one_line()(convert))
app.command()(errors_in_one_line()(export))
