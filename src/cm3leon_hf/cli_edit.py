"""`cm3leon edit`: a picture changed as an instruction says."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_generate import check_candidates, label, save
from .cli_loading import (
    Bank,
    ClipModel,
    ClipWeights,
    Seed,
    Temperature,
    TopP,
    load,
    load_augmenter,
    load_clip,
    load_ranker,
)


def edit(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's path or address.")],
    instruction: Annotated[str, typer.Argument(metavar="INSTRUCTION", help="What to change.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub name. The shipped model for emoji tasks when left out.", show_default=False
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 4,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How closely to follow the instruction.")] = 2.0,
    image_guidance_scale: Annotated[float, typer.Option(min=0, help="How closely to follow the picture.")] = 1.5,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Draw so many and keep the best by CLIP.", show_default=False)
    ] = None,
    retrieve: Annotated[
        int, typer.Option(min=0, max=2, help="Put so many documents that the picture retrieves in front of it.")
    ] = 0,
    bank: Bank = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    top_p: TopP = 0.9,
    temperature: Temperature = 1.0,
    seed: Seed = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("cm3leon-out"),
):
    """
    Change a picture as an instruction says.

    Writes `grid.png`, the given picture beside the edited ones, and the single pictures `00.png`, `01.png`, … into
    the folder, and prints their paths. The best candidates are those that are most like the instruction, for what is
    to change, the given picture, for what is to stay, and the other candidates, for what most of them agree on.

    The shipped model changes the style, skin tone, gender or colour of emoji, and leaves them as they are when told to.

    **Examples**

    `cm3leon edit apple.png "make it noto style" --retrieve 1 --candidates 8 --num-images 2`

    `cm3leon edit heart.png "make it blue" --num-images 8 --seed 1`

    `cm3leon edit waving.png "change the skin tone to dark" --out dark`
    """
    from .evaluation.reranking import Candidate, EditScorer, rank
    from .grid import draw_grid
    from .images import read_image
    from .progress import TokenProgress
    from .shipped import default_tuned_model

    check_candidates(candidates, num_images)
    given = read_image(image)
    clip = load_clip(clip_model, clip_weights) if candidates is not None or retrieve else None
    augmenter = load_augmenter(bank, clip) if retrieve else None
    model, processor = load(model or default_tuned_model(), seed)
    inputs = processor.for_editing(given, instruction)
    if augmenter:
        room = model.config.max_position_embeddings - processor.vocabulary.image_length
        inputs = processor.with_retrieved(inputs, augmenter.for_pictures([given], retrieve, by_text=True), room)
    ids = model.generate(
        **inputs.to(model.device),
        generation_mode="image",
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        do_sample=True,
        top_k=0,
        top_p=top_p,
        temperature=temperature,
        num_return_sequences=candidates or num_images,
        streamer=TokenProgress(processor.vocabulary.image_length, "drawing"),
    )
    pool = [Candidate(one, {}) for one in processor.post_process_multimodal_output(ids, generation_mode="image")]
    if candidates is not None:
        scorer = EditScorer(given, load_ranker(clip_model, clip_weights), clip)
        (pool,) = rank([pool], [instruction], scorer, num_images)
    labels = ["given", *(label(instruction, at, one) for at, one in enumerate(pool))]
    edited = [candidate.image for candidate in pool]
    grid = draw_grid([given, *edited], labels, columns=1 + num_images)
    save({"grid": grid} | {f"{index:02d}": picture for index, picture in enumerate(edited)}, out)
