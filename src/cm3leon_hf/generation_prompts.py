"""The prompts of a call of generate(), checked and without padding, and how many tokens are to follow them."""

import torch
from transformers import GenerationConfig

from .vocabulary import Vocabulary


def read_prompts(inputs, kwargs: dict, vocabulary: Vocabulary) -> tuple[list[torch.LongTensor], int]:
    """The prompts without padding, and the width they had with it; takes theirs out of the call's arguments."""
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"expected input_ids as a tensor of shape (batch, length) with at least one token, got "
            f"{tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids)}; make prompts with the processor"
        )
    return without_padding(ids, kwargs.pop("attention_mask", None), vocabulary), ids.shape[1]


def without_padding(ids, attention_mask, vocabulary: Vocabulary) -> list[torch.LongTensor]:
    """`(batch, length)` ids to one tensor a row; where there is no mask, padding is known by its id."""
    if ids is None:
        return []
    if not (ids.min() >= 0 and ids.max() < vocabulary.size):
        raise ValueError(
            f"expected ids in [0, {vocabulary.size}), got {ids.min().item()} to {ids.max().item()}; "
            "use the processor that was saved with this model"
        )
    mask = ids != vocabulary.pad_id if attention_mask is None else attention_mask.to(ids.device).bool()
    if mask.shape != ids.shape:
        raise ValueError(
            f"expected an attention mask of shape {tuple(ids.shape)}, as the ids, got {tuple(mask.shape)}; "
            "make both with the processor"
        )
    rows = [row[kept] for row, kept in zip(ids, mask)]
    if not all(len(row) for row in rows):
        raise ValueError("expected at least one token in each prompt, got a row of padding; drop empty prompts")
    return rows


def open_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """`<eos> text` becomes `<eos> text <break>`, where an image begins; an open one, `<break>` or `<infill>`, stays."""
    opened = ids[-1] in (vocabulary.break_id, vocabulary.infill_id)
    return ids if opened else torch.cat([ids, ids.new_tensor([vocabulary.break_id])])


def needed_image_tokens(prompts: list, known_ids: torch.LongTensor | None, mode: str, vocabulary: Vocabulary) -> int:
    """
    How many image tokens have to follow: the span that is to be filled, one image, or what an open one still lacks.

    Raises:
        ValueError: if `known_ids` do not fit the mode, the prompts or the vocabulary.
    """
    if known_ids is not None:
        check_known(known_ids, len(prompts), mode, vocabulary)
        return known_ids.shape[1]
    if mode == "interleaved":
        return max(tokens_to_whole_image(ids, vocabulary) for ids in prompts)
    return vocabulary.image_length if mode == "image" else 0


def check_known(known_ids: torch.LongTensor, count: int, mode: str, vocabulary: Vocabulary) -> None:
    fits = known_ids.ndim == 2 and known_ids.shape[0] == count and 0 < known_ids.shape[1] <= vocabulary.image_length
    if mode != "image" or not fits or not ((known_ids == -1) | vocabulary.is_image(known_ids)).all():
        raise ValueError(
            f"expected known_ids in image mode, image ids and -1 of shape ({count}, up to {vocabulary.image_length}), "
            f"got {tuple(known_ids.shape)} in {mode!r} mode; make them with processor.for_infilling"
        )


def tokens_to_whole_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> int:
    """How many tokens an interleaved prompt `(length,)` still needs for the image that it has opened; 0 without one."""
    is_image = vocabulary.is_image(ids)
    run = int(is_image.flip(0).long().cumprod(0).sum())
    opens = ids[-1] == vocabulary.break_id and not (len(ids) > 1 and is_image[-2])
    return vocabulary.image_length if opens else -run % vocabulary.image_length


def set_length(config: GenerationConfig, mode: str, width: int, tokens: int, needed: int, positions: int) -> None:
    """
    Sets `max_new_tokens`: images get exactly what they need, text ends at the last position at the latest.

    Args:
        config ([`GenerationConfig`]): The call's, which is changed.
        mode (`str`): Generation mode.
        width (`int`): Columns of the user's prompts, padding included, which `max_length` counts.
        tokens (`int`): Tokens of the longest prompt, of guidance included.
        needed (`int`): Image tokens that have to follow.
        positions (`int`): Positions of the model.

    Raises:
        ValueError: if what is needed has no room in the positions, or in the length that the caller wants.
    """
    left = positions - tokens
    if left < max(needed, 1):
        raise ValueError(
            f"expected a prompt of at most {positions - max(needed, 1)} tokens, which leaves room for the "
            f"{mode} in {positions} positions, got {tokens}; shorten the prompt or retrieve fewer documents"
        )
    if mode == "image":
        config.forced_eos_token_id = None  # an image ends by its length
        wanted = needed
    else:
        wanted = text_length(config, width, left)
    if wanted < needed:
        raise ValueError(
            f"expected room for the {needed} image tokens that the prompt asks for, got max_new_tokens={wanted}; "
            "raise it"
        )
    config.max_new_tokens, config.max_length = wanted, None


def text_length(config: GenerationConfig, width: int, left: int) -> int:
    """New tokens that the caller wants, at most `left`."""
    wanted = config.max_new_tokens
    if wanted is None and (limit := config.max_length) is not None:
        if limit <= width:
            raise ValueError(
                f"expected max_length to be more than the prompt's {width} tokens, got {limit}; set max_new_tokens"
            )
        wanted = limit - width
    return left if wanted is None else min(wanted, left)
