"""`cm3leon describe`: text from a picture."""

from typing import Annotated

import typer

from .cli_loading import Model, Seed, load


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
    model, processor = load(model, seed)
    inputs = processor.for_image_to_text(image)
    ids = model.generate(**inputs, generation_mode="text", do_sample=sample, max_new_tokens=max_new_tokens)
    new = ids[:, inputs["input_ids"].shape[1] :]
    print(processor.post_process_multimodal_output(new, generation_mode="text")[0].strip())
