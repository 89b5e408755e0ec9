"""How likely a model finds each of several answers, as the Visual Dialog challenge ranks a hundred."""

import copy
from collections.abc import Sequence

import torch
from PIL import Image

from ..processing_prompts import IMAGE_TO_TEXT
from ..vocabulary import MASK

BATCH = 25  # options at a time


def asking(prompt: str) -> str:
    """
    A prompt whose continuation is a text about a picture (section 2.2).

    Args:
        prompt (`str`): What stands in front of the picture. A `<mask>` in it is the text's place; without one, the text
            comes last.
    """
    return prompt + (IMAGE_TO_TEXT.removeprefix(MASK) if MASK in prompt else IMAGE_TO_TEXT)


@torch.no_grad()
def score_options(
    picture: Image.Image, prompt: str, options: Sequence[str], model, processor, batch_size: int = BATCH
) -> list[float]:
    """
    The mean log-probability of each option's tokens, its end included, behind the prompt and the picture.

    Ours: the mean, for the sum would prefer short answers. The prompt goes through the model once.

    Args:
        picture (`PIL.Image.Image`): What is asked about.
        prompt (`str`): See [`asking`].
        options (`Sequence[str]`): Answers.
        model ([`CM3LeonForCausalLM`]): Scores.
        processor ([`CM3LeonProcessor`]): Makes ids.
        batch_size (`int`): Options in one forward pass.

    Raises:
        ValueError: for an empty option, or more tokens than the model has positions.
    """
    if not options or not all(option.strip() for option in options):
        raise ValueError("expected options that are not empty, got an empty one or none; leave it out")
    ids = processor(text=asking(prompt), images=picture)["input_ids"].to(model.device)
    end = [processor.vocabulary.eos_id]
    said = [processor.tokenizer(f" {one.strip()}", add_special_tokens=False)["input_ids"] + end for one in options]
    longest = ids.shape[1] + max(map(len, said))
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"expected at most {model.config.max_position_embeddings} tokens, got {longest}; shorten them")
    begun = model(ids, use_cache=True)
    scores = []
    for start in range(0, len(said), batch_size):
        scores += _score(begun, said[start : start + batch_size], model, processor.vocabulary.pad_id)
    return scores


def _score(begun, said: list[list[int]], model, pad: int) -> list[float]:
    """Scores of some options, lists of ids, behind a prompt that went through the model as a batch of one."""
    longest = max(map(len, said))
    tokens = torch.tensor([one + [pad] * (longest - len(one)) for one in said], device=model.device)
    logits = begun.logits[:, -1:].expand(len(said), -1, -1)
    cache = copy.deepcopy(begun.cache)
    cache.batch_repeat_interleave(len(said))
    behind = model(tokens, cache=cache, use_cache=True).logits[:, :-1]
    paid = torch.cat([logits, behind], dim=1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    lengths = torch.tensor([len(one) for one in said], device=model.device)
    kept = torch.arange(longest, device=model.device) < lengths[:, None]
    return ((paid * kept).sum(1) / lengths).tolist()


__all__ = ["asking", "score_options"]
