"""Which guidance a call of generate() asks for, and the prompts of its branches."""

import torch
from transformers import GenerationConfig

from .logits_processors import (
    BatchedGuidanceLogitsProcessor,
    BranchLogitsProcessor,
    ContrastiveLogitsProcessor,
    ImageTextGuidanceLogitsProcessor,
)
from .vocabulary import Vocabulary

GUIDANCE_ARGUMENTS = ("guidance_scale", "image_guidance_scale", "contrastive_alpha", "contrastive_k")
IMAGE_EDITING_TEXT_SCALE = 7.5  # section 4.1, for image_guidance_scale without a guidance_scale


def guidance_values(config: GenerationConfig | None) -> dict:
    """What a configuration says of guidance, `None` where it says nothing."""
    return {name: getattr(config, name, None) for name in GUIDANCE_ARGUMENTS}


def choose_guidance(call: dict, passed: dict, own: dict, mode: str, steered: bool) -> BranchLogitsProcessor | None:
    """
    The guidance that a call asks for: the first source that names a strategy decides.

    Args:
        call, passed, own (`dict`): Values of `GUIDANCE_ARGUMENTS` (`None` where not given) in the call, in the
            configuration that it passes, and in the model's own defaults. The defaults are for drawing: text is guided
            by them only where the call brings something to guide it away from. A passed configuration that says the
            same counts as the defaults, since pipelines pass them on; an argument of the call always counts.
        mode (`str`): Generation mode.
        steered (`bool`): Whether the call brings negative prompts.

    Returns:
        The processor, or `None` where nothing is guided.

    Raises:
        ValueError: for a value out of range, or two strategies in one source.
    """
    sources = [call, passed, own]
    if mode != "image" and not steered:
        sources = [call] if passed == own else [call, passed]
    for source in sources:
        guidance = guidance_of(**source)
        if any(value is not None for value in source.values()):
            return guidance
    return None


def guidance_of(
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    contrastive_alpha: float | None = None,
    contrastive_k: int | None = None,
) -> BranchLogitsProcessor | None:
    """The processor that these values ask for; a guidance scale of 1 is none."""
    guided = guidance_scale is not None and guidance_scale != 1
    contrastive = {"contrastive_alpha": contrastive_alpha, "contrastive_k": contrastive_k}
    contrastive = {name: value for name, value in contrastive.items() if value is not None}
    if contrastive and (guided or image_guidance_scale is not None):
        raise ValueError(
            f"expected contrastive decoding or guidance, got {contrastive} with guidance_scale={guidance_scale} and "
            f"image_guidance_scale={image_guidance_scale}; leave one out"
        )
    if contrastive:
        return ContrastiveLogitsProcessor(**contrastive)
    if image_guidance_scale is not None:
        text_scale = IMAGE_EDITING_TEXT_SCALE if guidance_scale is None else guidance_scale
        return ImageTextGuidanceLogitsProcessor(text_scale, image_guidance_scale)
    return BatchedGuidanceLogitsProcessor(guidance_scale) if guided else None


def branches(
    guidance: BranchLogitsProcessor, prompts: list, negatives: list, mode: str, vocabulary: Vocabulary
) -> list[list[torch.LongTensor]]:
    """
    The prompts of the branches behind the first, each a list with one `(length,)` prompt for each of the user's.

    Raises:
        ValueError: if the prompts hold nothing to leave out, or negative prompts do not fit.
    """
    if negatives and guidance.branches > 2:
        raise ValueError("expected negative prompts or image_guidance_scale, which has prompts of its own, got both")
    if negatives and len(negatives) not in (1, len(prompts)):
        raise ValueError(
            f"expected one negative prompt, or one for each of the {len(prompts)} prompts, got {len(negatives)}"
        )
    if negatives:
        return [negatives * len(prompts) if len(negatives) == 1 else negatives]
    if mode == "image":
        plain = [without_text(ids, vocabulary) for ids in prompts]
        if guidance.branches == 2:
            return [plain]
        return [plain, _changed(plain, [without_images(ids, vocabulary) for ids in plain], "image_guidance_scale")]
    if mode == "text" and guidance.branches == 2:
        return [_changed(prompts, [without_images(ids, vocabulary) for ids in prompts], "guidance of text")]
    raise ValueError(
        f"expected negative_prompt_ids to guide away from in {mode!r} mode, got none; pass them, or set "
        "guidance_scale=1 and leave image_guidance_scale and contrastive_alpha out"
    )


def without_text(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """
    The unconditional prompt (section 3.3): the text in front of the image replaced by `<mask>`; `ids` is `(length,)`.

    The image is the one behind the last `<break>`, begun or still to come; its text begins behind the `<eos>` or
    `<break>` before that. What its document has further in front, such as the picture to edit, stays. Retrieved
    documents go: they are found by the text and say what it says, so that guidance would lead away from it.
    """
    stop = int((ids == vocabulary.break_id).nonzero()[-1])
    documents = (ids[:stop] == vocabulary.eos_id).nonzero().flatten()
    walls = ((ids[:stop] == vocabulary.break_id) | (ids[:stop] == vocabulary.eos_id)).nonzero().flatten()
    begin = int(documents[-1]) if len(documents) else 0
    start = int(walls[-1]) + 1 if len(walls) else 0
    return torch.cat([ids[begin:start], ids.new_tensor([vocabulary.mask_id]), ids[stop:]])


def without_images(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """The prompt without what its last document shows: each of its whole images replaced by `<mask>`."""
    documents = (ids == vocabulary.eos_id).nonzero().flatten()
    shown = vocabulary.is_image(ids)
    shown[: int(documents[-1]) if len(documents) else 0] = False
    first = shown & ~torch.cat([shown.new_zeros(1), shown[:-1]])
    return torch.where(first, vocabulary.mask_id, ids)[first | ~shown]


def pad_left(rows: list[torch.LongTensor], length: int, pad_id: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids `(rows, length)` of prompts of any lengths up to that, padded on the left, and their attention mask."""
    ids = rows[0].new_full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask


def add_branches(own: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Own rows `(batch, length)`, then each branch's rows: its prompt, continued with the tokens generated so far."""
    generated = own[:, branches.shape[2] :]
    return torch.cat([own, *(torch.cat([prompt, generated], dim=1) for prompt in branches.unbind(1))])


def _changed(prompts: list, others: list, what: str) -> list:
    """The others, if each differs from its prompt."""
    if any(len(prompt) == len(other) and bool((prompt == other).all()) for prompt, other in zip(prompts, others)):
        raise ValueError(
            f"expected an image in each prompt for {what} to leave out, got a prompt without; pass negative_prompt_ids "
            "or leave it unguided"
        )
    return others
