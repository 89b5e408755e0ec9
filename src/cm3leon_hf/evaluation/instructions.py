"""Answers to instruction rows: the prompt that a row's document begins with, and what a model makes of it."""

from collections.abc import Sequence

import torch

from ..vocabulary import BREAK, IMAGE, INFILL, MASK
from .clip_score import CLIPScorer
from .reranking import GREEDY, EditScorer, best_texts_of


def instruction_prompt(texts: Sequence[str | None], answer: int) -> str:
    """
    The prompt whose continuation is a row's answer, as the processor takes it: each image is an `<image>`.

    An image is drawn behind all that stands in front of it. A text fills the `<mask>` in its place, as in section 2.2,
    so that the images behind it are read first.

    Args:
        texts (`Sequence[str | None]`): The row's parts; `None` where an image stands.
        answer (`int`): The part that is the answer.

    Raises:
        ValueError: if an image is the answer and does not stand last.
    """
    if texts[answer] is None and answer != len(texts) - 1:
        raise ValueError(f"expected an image that is the answer as the last part, got part {answer} of {len(texts)}")
    is_drawn = texts[answer] is None
    shown = [*texts[:answer], *([] if is_drawn else [MASK, *texts[answer + 1 :]])]
    prompt, before = "", shown[0]
    for part in shown:
        prompt += (BREAK if (part is None) != (before is None) else "") + (IMAGE if part is None else part)
        before = part
    return f"{prompt}{BREAK if is_drawn else INFILL}"


def is_drawn(row: dict) -> bool:
    """Whether a row's answer is an image."""
    return row["texts"][row["answer"]] is None


def answer_instructions(rows: Sequence[dict], model, processor, arguments: dict | None = None) -> list[list[int] | str]:
    """
    A model's answers to rows whose answers are all images, or all texts.

    Args:
        rows (`Sequence[dict]`): With `texts`, `codes` and `answer`, and `retrieved` if they stand behind documents,
            each with `text` and `codes`, the best first; those that do not fit with the answer are left out.
        model ([`CM3LeonForCausalLM`]): Answers.
        processor ([`CM3LeonProcessor`]): Makes ids.
        arguments (`dict`, *optional*): Of `generate`; texts are greedy and unguided by default.

    Returns:
        Codes `(image_length,)` of an image, or a text without spaces around it, for each row, or several for each
        where the arguments ask for them.

    Raises:
        ValueError: for rows of both kinds.
    """
    drawn = {is_drawn(row) for row in rows}
    if len(drawn) != 1:
        raise ValueError(f"expected rows whose answers are all images or all texts, got {len(rows)} of both kinds")
    inputs = instruction_inputs(rows, model, processor, arguments or {})
    if drawn == {True}:
        ids = model.generate(**inputs, generation_mode="image", **arguments or {})
        vocabulary = processor.vocabulary
        return vocabulary.ids_to_codes(ids[:, -vocabulary.image_length :]).tolist()
    ids = model.generate(**inputs, generation_mode="text", **GREEDY | (arguments or {}))
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.post_process_multimodal_output(new, generation_mode="text")]


def instruction_inputs(rows: Sequence[dict], model, processor, arguments: dict):
    """The rows' prompts, behind their documents, as `generate` takes them with these arguments."""
    prompts = [instruction_prompt(row["texts"], row["answer"]) for row in rows]
    stops = [row["answer"] if is_drawn(row) else len(row["codes"]) for row in rows]
    shown = [one for row, stop in zip(rows, stops) for one in row["codes"][:stop] if one is not None]
    inputs = processor(text=prompts, image_codes=torch.tensor(shown) if shown else None).to(model.device)
    if any(row.get("retrieved") for row in rows):
        inputs = behind_documents(inputs, rows, model, processor, arguments).to(model.device)
    return inputs


def best_edits(
    rows: Sequence[dict],
    model,
    processor,
    ranker: CLIPScorer,
    clip: CLIPScorer,
    candidates: int,
    arguments: dict | None = None,
) -> list[list[int]]:
    """
    The codes `(image_length,)` of the best edit for each row, of so many candidates, by CLIP ([`EditScorer`]).

    Args:
        rows (`Sequence[dict]`): Whose last image is the answer, whose first one is to be edited, and whose last text
            is the instruction.
        model, processor, arguments: As in [`answer_instructions`].
        ranker, clip ([`CLIPScorer`]): Rank the candidates.
        candidates (`int`): Drawn for each row.

    Raises:
        ValueError: if a row's answer is no image, or nothing stands in front of it to be edited.
    """
    if any(not is_drawn(row) or len(images_of(row)) < 2 for row in rows):
        raise ValueError("expected edits, whose answer is an image behind another one, got other rows; draw one each")
    arguments, together = (arguments or {}) | {"num_return_sequences": candidates}, max(1, len(rows) // candidates)
    drawn = []
    for start in range(0, len(rows), together):  # as many pictures at a time as there are rows
        drawn += answer_instructions(rows[start : start + together], model, processor, arguments)
    best = []
    for index, row in enumerate(rows):
        own = drawn[index * candidates : (index + 1) * candidates]
        given, *pictures = processor.decode_images(torch.tensor([images_of(row)[0], *own]))
        instruction = [text for text in row["texts"] if text][-1].strip()
        scores = EditScorer(given, ranker, clip)(pictures, [instruction] * candidates)
        best.append(own[scores.index(max(scores))])
    return best


def best_texts(
    rows: Sequence[dict], model, processor, ranker: CLIPScorer, candidates: int, arguments: dict | None = None
) -> list[str]:
    """
    The text for each row, of the likeliest ones, that fits its last image best; as [`best_texts_of`] ranks them.

    Args:
        rows (`Sequence[dict]`): As in [`answer_instructions`]; with `picture`, the last image in RGB before it was
            coded, which may show more than its codes.
        model, processor, arguments: As in [`answer_instructions`].
        ranker ([`CLIPScorer`]): Ranks the candidates.
        candidates (`int`): Beams for each row.

    Raises:
        ValueError: if a row's answer is an image, or there is none to compare its text with.
    """
    if any(is_drawn(row) or not images_of(row) for row in rows):
        raise ValueError("expected rows whose answer is a text about an image, got other rows; write one text each")
    inputs = instruction_inputs(rows, model, processor, arguments or {})
    pictures = [row.get("picture") or processor.decode_images(torch.tensor(images_of(row)[-1:]))[0] for row in rows]
    return best_texts_of(inputs, pictures, model, processor, ranker, candidates, **arguments or {})


def images_of(row: dict) -> list[list[int]]:
    """The codes of a row's images, in their order."""
    return [codes for text, codes in zip(row["texts"], row["codes"]) if text is None]


def behind_documents(inputs, rows: Sequence[dict], model, processor, arguments: dict):
    """The rows' prompts behind their retrieved documents, as far as there is room beside an answer."""
    length = processor.vocabulary.image_length
    if not is_drawn(rows[0]):
        length = arguments.get("max_new_tokens", model.generation_config.max_new_tokens or length)
    documents = [row.get("retrieved") or [] for row in rows]
    return processor.with_retrieved(inputs, documents, model.config.max_position_embeddings - length)


__all__ = ["answer_instructions", "best_edits", "best_texts", "instruction_prompt", "is_drawn"]
