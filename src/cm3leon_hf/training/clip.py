"""CLIP's training objective as one module with one loss, so that the stock Trainer trains any model of open_clip."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from open_clip import CLIP, ClipLoss
from open_clip.tokenizer import HFTokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import EvalPrediction

LARGEST_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class CLIPObjective(nn.Module):
    """A CLIP and its contrastive loss over a batch of pictures and their texts."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip, self.contrastive_loss = clip, ClipLoss()

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, return_loss: bool = True) -> dict:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Pictures, normalised.
            input_ids (`torch.LongTensor` of shape `(batch, context_length)`): Their texts.

        Returns:
            `dict`: `loss`, and the unit vectors `image_features` and `text_features`, `(batch, embed_dim)`.
        """
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, LARGEST_SCALE)
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        image_features, text_features, scale = self.clip(pixel_values, input_ids)
        features = {"image_features": image_features.float(), "text_features": text_features.float()}
        return {"loss": self.contrastive_loss(*features.values(), scale)} | features


def recall_at_1(result: EvalPrediction) -> dict[str, float]:
    """How often a text and its own picture are each other's nearest; for `Trainer(compute_metrics=…)`."""
    similarity = torch.from_numpy(result.predictions[0]) @ torch.from_numpy(result.predictions[1]).T
    own = torch.arange(len(similarity))
    return {
        "text_to_image_r1": (similarity.argmax(0) == own).float().mean().item(),
        "image_to_text_r1": (similarity.argmax(1) == own).float().mean().item(),
    }


def alike_batches(
    values: Sequence[Hashable], size: int, share: float, rng: np.random.Generator, passes: int = 1
) -> list[int]:
    """
    An order of rows in which some batches hold one value only, so that a CLIP learns to tell rows apart by all else.

    Args:
        values (`Sequence[Hashable]`): A value of each row, such as its style.
        size (`int`): Rows in a batch.
        share (`float`): Share of the rows in such batches, in [0, 1]; the other batches are of any rows.
        rng (`np.random.Generator`): Shuffles.
        passes (`int`): Equal parts that the rows consist of, such as those of [`balanced_rows`], which see all groups
            once: no batch holds rows of two.

    Returns:
        `list[int]`: row numbers, for `datasets.Dataset.select` and a sequential sampler. All of them, but for less than
        a batch at the end of each pass before the last.
    """
    order = []
    for rows in np.split(np.arange(len(values)), passes):
        order = order[: len(order) // size * size] + _batches_of_a_pass(rng.permutation(rows), values, size, share, rng)
    return order


def _batches_of_a_pass(
    rows: np.ndarray, values: Sequence[Hashable], size: int, share: float, rng: np.random.Generator
) -> list[int]:
    alike, mixed = np.split(rows, [round(share * len(rows))])
    groups = defaultdict(list)
    for row in alike:
        groups[values[row]].append(row)
    left_over = [group[len(group) // size * size :] for group in groups.values()]
    mixed = rng.permutation(np.concatenate([mixed, *left_over]).astype(int))
    batches = [group[at : at + size] for group in groups.values() for at in range(0, len(group) - size + 1, size)]
    whole = len(mixed) // size * size
    batches += mixed[:whole].reshape(-1, size).tolist()
    order = [row for at in rng.permutation(len(batches)) for row in batches[at]]
    return [int(row) for row in [*order, *mixed[whole:]]]


def clip_tokenizer(folder: str, context_length: int) -> HFTokenizer:
    """
    Our text tokenizer as open_clip wants one: padded on the right, and with one `<eos>`, at which the text is pooled.

    Args:
        folder (`str`): Of the text tokenizer.
        context_length (`int`): Tokens of a text, `<eos>` included; longer texts are cut.
    """
    tokenizer = HFTokenizer(folder, context_length)
    inner = tokenizer.tokenizer
    inner.padding_side = "right"
    end = (inner.eos_token, inner.eos_token_id)
    inner.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return tokenizer
