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
from torch.nn import functional as F
from transformers import EvalPrediction

from ..retrieval import shades  # noqa: F401  a trunk that open_clip finds by name from here on

LARGEST_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
SMOOTHING = 0.05  # of the labels of classifiers


class CLIPObjective(nn.Module):
    """
    A CLIP and its contrastive loss over a batch of pictures and their texts.

    Args:
        clip (`CLIP`): Of open_clip.
        classes (sequence of `int`): How many classes there are of each kind, such as four styles, that the vectors of
            pictures are taught to tell apart by a linear classifier as well. It is not part of the CLIP.
        contrastive_weight (`float`): What the contrastive loss counts for; each classifier's counts 1.
    """

    def __init__(self, clip: CLIP, classes: Sequence[int] = (), contrastive_weight: float = 1.0):
        super().__init__()
        self.clip, self.contrastive_loss, self.contrastive_weight = clip, ClipLoss(), contrastive_weight
        width = clip.text_projection.shape[1] if classes else 0
        self.heads = nn.ModuleList([nn.Linear(width, count) for count in classes])

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        kinds: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> dict:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Pictures, normalised.
            input_ids (`torch.LongTensor` of shape `(batch, context_length)`): Their texts.
            kinds (`torch.LongTensor` of shape `(batch, len(classes))`, *optional*): Their classes, -100 if unknown.

        Returns:
            `dict`: `loss`, and the unit vectors `image_features` and `text_features`, `(batch, embed_dim)`.
        """
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, LARGEST_SCALE)
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        image_features, text_features, scale = self.clip(pixel_values, input_ids)
        features = {"image_features": image_features.float(), "text_features": text_features.float()}
        loss = self.contrastive_weight * self.contrastive_loss(*features.values(), scale)
        for head, own in zip(self.heads, kinds.T if self.heads else ()):
            logits = scale * head(features["image_features"]).float()
            loss = loss + F.cross_entropy(logits, own, label_smoothing=SMOOTHING)
        return {"loss": loss} | features


def recall_at_1(result: EvalPrediction) -> dict[str, float]:
    """How often a text and its own picture are each other's nearest; for `Trainer(compute_metrics=…)`."""
    similarity = torch.from_numpy(result.predictions[0]) @ torch.from_numpy(result.predictions[1]).T
    own = torch.arange(len(similarity))
    return {
        "text_to_image_r1": (similarity.argmax(0) == own).float().mean().item(),
        "image_to_text_r1": (similarity.argmax(1) == own).float().mean().item(),
    }


def alike_batches(
    values: Sequence[Hashable],
    size: int,
    share: float,
    rng: np.random.Generator,
    passes: int = 1,
    near: Sequence[Hashable] | None = None,
    near_share: float = 0.5,
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
        near (`Sequence[Hashable]`, *optional*): Another value of each row, such as its subgroup. In some of the batches
            of one value, rows of the same one stand together: those that are hardest to tell apart.
        near_share (`float`): Share of the batches of one value that are like this, in [0, 1].

    Returns:
        `list[int]`: row numbers, for `datasets.Dataset.select` and a sequential sampler. All of them, but for less than
        a batch at the end of each pass before the last.
    """
    order = []
    for rows in np.split(np.arange(len(values)), passes):
        rows = rng.permutation(rows)
        batches = _near_batches(rows, values, near, size, share * near_share, rng) if near else []
        rows = rows[~np.isin(rows, batches)]
        left = share * (1 - near_share) / (1 - share * near_share) if near and share * near_share < 1 else share
        whole, rest = _cut_to_size(_groups(rows[: round(left * len(rows))], values), size)
        batches += whole
        mixed = rng.permutation([*rows[round(left * len(rows)) :], *rest]).astype(int)
        whole, rest = _cut_to_size([mixed], size)
        batches += whole
        order = order[: len(order) // size * size]
        order += [int(row) for at in rng.permutation(len(batches)) for row in batches[at]] + [int(row) for row in rest]
    return order


def _near_batches(
    rows: np.ndarray,
    values: Sequence[Hashable],
    near: Sequence[Hashable],
    size: int,
    share: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Batches of one value, in which rows of the same `near` stand together: such a share of all that there are."""
    batches = []
    for group in _groups(rows, values):
        together = np.concatenate(_shuffled(_groups(group, near), rng))
        batches += _cut_to_size([np.roll(together, rng.integers(size))], size)[0]
    return _shuffled(batches, rng)[: round(share * len(batches))]


def _shuffled(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    return [parts[at] for at in rng.permutation(len(parts))]


def _groups(rows: np.ndarray, values: Sequence[Hashable]) -> list[np.ndarray]:
    groups = defaultdict(list)
    for row in rows:
        groups[values[row]].append(row)
    return [np.array(group) for group in groups.values()]


def _cut_to_size(groups: list[np.ndarray], size: int) -> tuple[list[np.ndarray], list[int]]:
    """Whole batches of each group, and the rows that are left over."""
    batches = [group[at : at + size] for group in groups for at in range(0, len(group) - size + 1, size)]
    return batches, [row for group in groups for row in group[len(group) // size * size :]]


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
