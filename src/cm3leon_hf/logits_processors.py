"""Decoding policy as logits processors: guidance, and which modality may follow."""

import torch
from transformers import LogitsProcessor

from .vocabulary import Vocabulary


class BatchedGuidanceLogitsProcessor(LogitsProcessor):
    r"""
    Classifier-free guidance (paper, equation 2) over branches that are rows of one batch.

    The model's batch is the user's batch with text, then the same batch without: `(2 * batch, vocab_size)` scores
    become `(batch, vocab_size)`:

    $$\text{logits} = \text{logits}_{uncond} + \alpha (\text{logits}_{cond} - \text{logits}_{uncond})$$

    It must come before every processor that masks logits: −inf minus −inf is no number.

    Args:
        guidance_scale (`float`): α, at least 0; 1 is no guidance, 0 ignores the text.

    Raises:
        ValueError: if the scale is negative or not finite, or the rows are not two for each row of `input_ids`.
    """

    def __init__(self, guidance_scale: float):
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"expected a finite guidance_scale >= 0, got {guidance_scale}; 1 turns guidance off")
        self.guidance_scale = guidance_scale

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(scores) != 2 * len(input_ids):
            raise ValueError(f"expected {2 * len(input_ids)} rows, with text and without, got {len(scores)}")
        conditional, unconditional = scores.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


class ModalityLogitsProcessor(LogitsProcessor):
    """
    Lets only the tokens of one modality follow.

    Args:
        vocabulary ([`Vocabulary`]): Layout of the ids.
        generation_mode (`str`): `"image"` lets only image tokens follow; `"text"` lets text, box coordinates and
            `<eos>` follow, and no image token nor any other control token.
    """

    def __init__(self, vocabulary: Vocabulary, generation_mode: str):
        allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
        if generation_mode == "image":
            allowed[vocabulary.image_ids] = True
        else:
            allowed[vocabulary.image_id + 1 : vocabulary.text_size] = True
            allowed[vocabulary.eos_id] = True
        self.forbidden = ~allowed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.masked_fill(self.forbidden.to(scores.device), -torch.inf)


__all__ = ["BatchedGuidanceLogitsProcessor", "ModalityLogitsProcessor"]
