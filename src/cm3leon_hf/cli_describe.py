"""`cm3leon describe`: text from a picture."""

from typing import Annotated

import typer

from .cli_loading import Bank, ClipModel, ClipWeights, Model, Seed, load, load_augmenter, load_clip


def describe(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's path or address.")],
    model: Model = None,
    text: Annotated[
        str, typer.Option(help="Instruction in front of the picture, such as `Describe the given picture.`")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest description, in tokens.")] = 64,
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

    `cm3leon describe apple.png --retrieve 1`
    """
    from .images import read_image

    picture = read_image(image)
    augmenter = load_augmenter(bank, load_clip(clip_model, clip_weights)) if retrieve else None
    model, processor = load(model, seed)
    inputs = processor.for_image_to_text(picture, text)
    if augmenter:
        room = model.config.max_position_embeddings - max_new_tokens
        inputs = processor.with_retrieved(inputs, augmenter.for_pictures([picture], retrieve), room)
    ids = model.generate(**inputs, generation_mode="text", do_sample=sample, max_new_tokens=max_new_tokens)
    new = ids[:, inputs["input_ids"].shape[1] :]
    print(processor.post_process_multimodal_output(new, generation_mode="text")[0].strip())
