"""`cm3leon generate`: pictures from text."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_loading import Bank, ClipModel, ClipWeights, Model, Seed, Temperature, TopP, load, load_augmenter, load_clip


class Strategy(str, Enum):
    cfg = "cfg"
    cd_k = "cd-k"
    both = "both"


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several prompts, several rows.")
    ],
    model: Model = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 4,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How closely to follow the text; 1 turns it off.")] = 3.0,
    top_p: TopP = 0.9,
    temperature: Temperature = 1.0,
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
    bank: Bank = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
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

    `cm3leon generate "sloth, twemoji style" --retrieve 1 --show-retrieved`
    """
    from .evaluation.reranking import draw_candidates, rank
    from .grid import draw_grid
    from .progress import TokenProgress

    check_candidates(candidates, num_images)
    scorer = load_clip(clip_model, clip_weights) if candidates is not None or retrieve else None
    retrieved = load_augmenter(bank, scorer).for_prompts(prompts, retrieve) if retrieve else None
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


def check_candidates(candidates: int | None, num_images: int) -> None:
    if candidates is not None and candidates < num_images:
        raise ValueError(f"expected at least {num_images} candidates to keep as many, got {candidates}; draw more")


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


def save(images: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        path = folder / f"{name}.png"
        image.save(path)
        print(path)
