"""Perplexity of text and image tokens apart."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ..vocabulary import Vocabulary
from .intervals import Measured, bootstrap

IGNORED = -100
MODALITIES = ("text", "image")


class TokenLosses(NamedTuple):
    """Sum of the losses in nats and number of tokens of each document, `(documents,)` each, for one modality."""

    total: np.ndarray
    tokens: np.ndarray

    def perplexity(self, resamples: int = 200, seed: int = 0) -> Measured:
        """
        The exponential of the mean loss a token, with replicates over documents.

        Raises:
            ValueError: if there are no tokens of this modality.
        """
        if not self.tokens.any():
            raise ValueError("expected tokens of this modality in the documents, got none")
        statistic = lambda weights: np.exp(weights @ self.total / max(weights @ self.tokens, 1))  # noqa: E731
        return bootstrap(statistic, len(self.tokens), resamples, seed)


@torch.no_grad()
def modality_losses(
    model, batches: Iterable[dict[str, torch.Tensor]], vocabulary: Vocabulary
) -> dict[str, TokenLosses]:
    """
    What the model pays for each modality's tokens, under the softmax over the whole vocabulary.

    Args:
        model ([`CM3LeonForCausalLM`]): Yields logits.
        batches (`Iterable[dict]`): What the model takes, with `labels` `(batch, length)`; -100 where none is wanted.
        vocabulary ([`Vocabulary`]): Tells image tokens from text, which holds the special tokens too.

    Returns:
        `dict` from `"text"` and `"image"` to [`TokenLosses`].
    """
    losses = {modality: [] for modality in MODALITIES}
    for batch in batches:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").double()
        for modality in MODALITIES:
            mine = (labels != IGNORED) & (vocabulary.is_image(labels) == (modality == "image"))
            losses[modality].append(torch.stack([(each * mine).sum(1), mine.sum(1).double()]).cpu())
    return {modality: TokenLosses(*torch.cat(parts, dim=1).numpy()) for modality, parts in losses.items()}


def measure_perplexities(losses: dict[str, TokenLosses], resamples: int = 200, seed: int = 0) -> dict[str, Measured]:
    """
    `perplexity` over all tokens (Figure 3), and `text_perplexity` and `image_perplexity` as far as there are such.

    Args:
        losses (`dict[str, TokenLosses]`): By [`modality_losses`].
        resamples, seed (`int`): See [`~cm3leon_hf.evaluation.intervals.bootstrap`].

    Raises:
        ValueError: if there are no tokens at all.
    """
    both = TokenLosses(*(sum(columns) for columns in zip(*losses.values())))
    apart = {f"{modality}_perplexity": one for modality, one in losses.items() if one.tokens.any()}
    return {name: one.perplexity(resamples, seed) for name, one in ({"perplexity": both} | apart).items()}


__all__ = ["MODALITIES", "TokenLosses", "measure_perplexities", "modality_losses"]
