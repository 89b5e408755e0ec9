"""Decoding policy as logits processors: guidance, contrastive decoding, which modality may follow, known tokens.

The guidance processors fold the rows of several branches into the user's rows. A token that any branch forbids (−inf)
stays forbidden, so no −inf minus −inf makes a NaN, whatever stands before them in the list.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from .vocabulary import Vocabulary


class BranchLogitsProcessor(LogitsProcessor):
    """
    Folds the scores of several branches, which are rows of one batch, into one row each.

    The model's batch is the user's batch once for each branch, one branch after the other: `(branches * batch,
    vocab_size)` scores become `(batch, vocab_size)`. Subclasses set `branches` and write `combine`.
    """

    branches = 2

    def combine(self, *branches: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of each branch, `(batch, vocab_size)`, to one; what any branch forbids is dropped afterwards."""
        raise NotImplementedError

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(scores) != self.branches * len(input_ids):
            raise ValueError(
                f"expected {self.branches * len(input_ids)} rows, {self.branches} branches for each of "
                f"{len(input_ids)} prompts, got {len(scores)}; put the branches' rows behind one another"
            )
        scores = scores.view(self.branches, len(input_ids), -1)
        forbidden = scores.isneginf().any(0)
        return self.combine(*scores).masked_fill(forbidden, -torch.inf)


class BatchedGuidanceLogitsProcessor(BranchLogitsProcessor):
    r"""
    Classifier-free guidance (paper, equation 2).

    Branches: with the text, without it.

    $$\text{logits} = \text{logits}_{uncond} + \alpha (\text{logits}_{cond} - \text{logits}_{uncond})$$

    Args:
        guidance_scale (`float`): α, at least 0; 1 is no guidance, 0 ignores the text.

    Raises:
        ValueError: if the scale is negative or not finite, or the rows are not two for each row of `input_ids`.
    """

    def __init__(self, guidance_scale: float):
        self.guidance_scale = checked_scale("guidance_scale", guidance_scale)

    def combine(self, conditional, unconditional):
        return unconditional + self.guidance_scale * (conditional - unconditional)


class ImageTextGuidanceLogitsProcessor(BranchLogitsProcessor):
    r"""
    Separate guidance by image and by text, for editing (section 4.1; InstructPix2Pix, Brooks et al. 2023, equation 3).

    Branches: with image and text, with the image alone, with neither.

    $$e(0, 0) + s_i (e(I, 0) - e(0, 0)) + s_t (e(I, T) - e(I, 0))$$

    Args:
        guidance_scale (`float`): s_t, how closely to follow the text, at least 0.
        image_guidance_scale (`float`): s_i, how closely to follow the image, at least 0.

    Raises:
        ValueError: if a scale is negative or not finite, or the rows are not three for each row of `input_ids`.
    """

    branches = 3

    def __init__(self, guidance_scale: float = 7.5, image_guidance_scale: float = 1.5):
        self.guidance_scale = checked_scale("guidance_scale", guidance_scale)
        self.image_guidance_scale = checked_scale("image_guidance_scale", image_guidance_scale)

    def combine(self, both, image, neither):
        return neither + self.image_guidance_scale * (image - neither) + self.guidance_scale * (both - image)


class ContrastiveLogitsProcessor(BranchLogitsProcessor):
    r"""
    Contrastive decoding over the k likeliest tokens, CD-K (paper, equation 3).

    Branches: the expert, with the text; the amateur, without it. Scores are log p_exp − log p_ama for the tokens

    $$p_{exp}(t) \ge \alpha \, \text{kmax}_{k}(p_{exp})$$

    and −inf for the others; kmax is the k-th largest probability, so k = 1 is plain contrastive decoding (Li et al.
    2022). Where fewer than k tokens may follow at all, each of them is kept.

    Args:
        contrastive_alpha (`float`): α in (0, 1]; smaller keeps more tokens.
        contrastive_k (`int`): k, at least 1.

    Raises:
        ValueError: if α or k is out of range, k exceeds the vocabulary, or the rows are not two for each row of
            `input_ids`.
    """

    def __init__(self, contrastive_alpha: float = 0.1, contrastive_k: int = 8):
        if not 0 < contrastive_alpha <= 1:
            raise ValueError(f"expected contrastive_alpha in (0, 1], got {contrastive_alpha}; the default is 0.1")
        if isinstance(contrastive_k, bool) or int(contrastive_k) != contrastive_k or contrastive_k < 1:
            raise ValueError(f"expected contrastive_k as a whole number of at least 1, got {contrastive_k}")
        self.contrastive_alpha, self.contrastive_k = contrastive_alpha, int(contrastive_k)

    def check_size(self, tokens: int) -> None:
        """Raises if there is no k-th largest among that many tokens."""
        if self.contrastive_k > tokens:
            raise ValueError(f"expected contrastive_k of at most {tokens}, the tokens there are, got a larger k: "
                             f"{self.contrastive_k}")  # fmt: skip

    def combine(self, expert, amateur):
        self.check_size(expert.shape[-1])
        kth = expert.topk(self.contrastive_k).values[:, -1:]  # of the logits: their normaliser cancels in the test
        kept = expert >= kth + torch.tensor(self.contrastive_alpha).log().to(expert)
        return (expert.log_softmax(-1) - amateur.log_softmax(-1)).masked_fill(~kept, -torch.inf)


class ModalityLogitsProcessor(LogitsProcessor):
    """
    Lets only the tokens of one modality follow, or keeps order between the two.

    The interleaved grammar reads `<break>` as the paper writes it, a change of modality: behind text it opens an image,
    and exactly one image's tokens follow; behind an image it opens text, of which at least one token follows. Behind a
    whole image only `<break>` and `<eos>` may stand.

    Args:
        vocabulary ([`Vocabulary`]): Layout of the ids.
        generation_mode (`str`): `"image"` lets only image tokens follow; `"text"` lets text, box coordinates and
            `<eos>` follow, and no image token nor any other control token; `"interleaved"` as above.
        max_length (`int`, *optional*): Columns at which generation ends; no image is opened that would be cut off.
    """

    supports_continuous_batching = True  # text and image mode do not look at what stands in a row

    def __init__(self, vocabulary: Vocabulary, generation_mode: str, max_length: int | None = None):
        self.vocabulary, self.generation_mode, self.max_length = vocabulary, generation_mode, max_length
        self.image = torch.zeros(vocabulary.size, dtype=torch.bool)
        self.image[vocabulary.image_ids] = True
        self.text = torch.zeros(vocabulary.size, dtype=torch.bool)
        self.text[vocabulary.image_id + 1 : vocabulary.text_size] = True
        self.text[[*vocabulary.mask_ids, *vocabulary.infill_ids]] = False  # those that are numbered
        self.text[vocabulary.eos_id] = True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.generation_mode == "interleaved":
            allowed = self.interleaved(input_ids)
            allowed = allowed.repeat(len(scores) // len(allowed), 1)  # the branches of guidance follow the same row
        else:
            allowed = self.image if self.generation_mode == "image" else self.text
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def interleaved(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Which ids may follow each row of `(batch, length)`; `(batch, vocab_size)`."""
        vocab, length = self.vocabulary, input_ids.shape[1]
        is_image = vocab.is_image(input_ids)
        run = is_image.flip(1).long().cumprod(1).sum(1)  # image tokens at the row's end
        at_break = input_ids[:, -1] == vocab.break_id
        after_image = is_image[:, -2] if length > 1 else torch.zeros_like(at_break)
        opens = (at_break & ~after_image) | ((run > 0) & (run % vocab.image_length > 0))
        ended = (run > 0) & (run % vocab.image_length == 0)
        allowed = torch.where(opens[:, None], self.image.to(opens.device), self.text.to(opens.device))
        room = self.max_length is None or length + 1 + vocab.image_length <= self.max_length
        allowed[:, vocab.break_id] = ended | (~opens & ~at_break & room)
        allowed[ended] = torch.zeros_like(self.text).to(opens.device)
        allowed[ended, vocab.break_id] = allowed[ended, vocab.eos_id] = True
        allowed[at_break & after_image, vocab.eos_id] = False
        return allowed


class KnownTokenLogitsProcessor(LogitsProcessor):
    """
    Forces the tokens that are known, and leaves the others free.

    Args:
        known_ids (`torch.LongTensor` of shape `(batch, new_length)`): The ids to come, -1 where they are free.
        prompt_length (`int`): Columns of the prompts; the first new token stands behind them.
    """

    def __init__(self, known_ids: torch.LongTensor, prompt_length: int):
        self.known_ids, self.prompt_length = known_ids, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        known = self.known_ids[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        known = known.repeat_interleave(len(scores) // len(known))[:, None]  # several sequences for each prompt
        ids = torch.arange(scores.shape[1], device=scores.device)
        forced = torch.zeros_like(scores).masked_fill(ids != known, -torch.inf)
        return torch.where(known < 0, scores, forced)


class TextHolesLogitsProcessor(LogitsProcessor):
    """
    Fills holes between pieces of text that are known: hole, piece, hole, piece, …, hole.

    The model closes a hole by writing the first token of the next piece; the rest of that piece is then forced. A hole
    holds at least one token and at most `max_hole_tokens`; `<eos>` may close the last hole only.

    Args:
        vocabulary ([`Vocabulary`]): Layout of the ids.
        pieces (`Sequence[Sequence[Sequence[int]]]`): For each prompt the pieces between its holes, as ids.
        prompt_length (`int`): Columns of the prompts.
        max_hole_tokens (`int`): Longest filling of a hole that a piece follows.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        pieces: Sequence[Sequence[Sequence[int]]],
        prompt_length: int,
        max_hole_tokens: int = 16,
    ):
        self.vocabulary, self.pieces = vocabulary, pieces
        self.prompt_length, self.max_hole_tokens = prompt_length, max_hole_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        copies = len(scores) // len(self.pieces)  # several sequences for each prompt
        for row, written in enumerate(input_ids[:, self.prompt_length :].tolist()):
            piece, offset, hole = self.place(self.pieces[row // copies], written)
            if piece is None:
                continue  # the last hole is free
            if offset or hole == self.max_hole_tokens:
                scores[row] = -torch.inf
                scores[row, piece[offset]] = 0
                continue
            scores[row, self.vocabulary.eos_id] = -torch.inf
            if hole == 0:
                scores[row, piece[0]] = -torch.inf
        return scores

    @staticmethod
    def place(pieces: Sequence[Sequence[int]], written: list[int]) -> tuple[Sequence[int] | None, int, int]:
        """The piece to come, how many of its tokens stand already, and how many tokens the open hole holds."""
        index, offset, hole = 0, 0, 0
        for token in written:
            if index == len(pieces):
                break
            if offset or (hole and token == pieces[index][0]):
                offset += 1
            else:
                hole += 1
            if offset == len(pieces[index]):
                index, offset, hole = index + 1, 0, 0
        return (pieces[index] if index < len(pieces) else None), offset, hole


def checked_scale(name: str, scale: float) -> float:
    """The scale, if it is one."""
    if not 0 <= scale < float("inf"):
        raise ValueError(f"expected a finite {name} >= 0, got {scale}; 1 turns guidance off")
    return scale


__all__ = [
    "BatchedGuidanceLogitsProcessor",
    "BranchLogitsProcessor",
    "ContrastiveLogitsProcessor",
    "ImageTextGuidanceLogitsProcessor",
    "KnownTokenLogitsProcessor",
    "ModalityLogitsProcessor",
    "TextHolesLogitsProcessor",
]
