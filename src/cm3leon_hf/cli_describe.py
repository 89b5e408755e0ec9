"""`cm3leon describe`: text from a picture."""

from typing import Annotated

import typer

from .cli_loading import Bank, ClipModel, ClipWeights, Model, Seed, load, load_augmenter, load_clip, load_ranker


def describe(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's path or address.")],
    model: Model = None,
    text: Annotated[
        str, typer.Option(help="Instruction in front of the picture, such as `Describe the given picture.`")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest description, in tokens.")] = 64,
    candidates: Annotated[
        int, typer.Option(min=1, help="Write so many, the likeliest ones, and keep what the model and CLIP agree on.")
    ] = 1,
    retrieve: Annotated[
        int, typer.Option(min=0, max=2, help="Put so many retrieved documents in front of the picture.")
    ] = 0,
    bank: Bank = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    seed: Seed = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw a description instead of the likeliest one.")] = False,
):
    """
    Say what is in a picture.

    **Examples**

    `cm3leon describe apple.png`

    `cm3leon describe apple.png --retrieve 1 --candidates 8`
    """
    from .evaluation.reranking import best_texts_of
    from .images import read_image

    if sample and candidates > 1:
        raise ValueError(f"expected --sample or --candidates, got both; the {candidates} candidates are the likeliest")
    picture = read_image(image)
    augmenter = load_augmenter(bank, load_clip(clip_model, clip_weights)) if retrieve else None
    ranker = load_ranker(clip_model, clip_weights) if candidates > 1 else None
    model, processor = load(model, seed)
    inputs = processor.for_image_to_text(picture, text)
    if augmenter:
        room = model.config.max_position_embeddings - max_new_tokens
        inputs = processor.with_retrieved(inputs, augmenter.for_pictures([picture], retrieve), room)
    if ranker:
        several = {"candidates": candidates, "max_new_tokens": max_new_tokens}
        print(*best_texts_of(inputs, [picture], model, processor, ranker, **several))
        return
    ids = model.generate(**inputs, generation_mode="text", do_sample=sample, max_new_tokens=max_new_tokens)
    new = ids[:, inputs["input_ids"].shape[1] :]
    print(processor.post_process_multimodal_output(new, generation_mode="text")[0].strip())
