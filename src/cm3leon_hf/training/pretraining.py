"""The Trainer of pretraining: faults, throughput, perplexity per modality, over streams that resume exactly."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import EvalPrediction

from ..modeling_cm3leon import CM3LeonForCausalLM
from ..modeling_loss import has_chunked_loss
from ..vocabulary import Vocabulary
from .faults import FiniteStepsMixin
from .resuming import ExactResumeMixin
from .throughput import ThroughputTrainer


class PretrainingTrainer(ExactResumeMixin, FiniteStepsMixin, ThroughputTrainer):
    """
    The stock Trainer for [`~cm3leon_hf.data.stream.PackedStream`], and for data sets of rows.

    Args:
        vocabulary ([`Vocabulary`]): Tells text from image tokens in the validation loss.
        max_skipped_steps (`int`): See [`FiniteStepsMixin`].

    The other arguments are those of `transformers.Trainer`.
    """

    def __init__(self, *args, vocabulary: Vocabulary, **kwargs):
        super().__init__(
            *args,
            preprocess_logits_for_metrics=token_losses(vocabulary),
            compute_metrics=perplexities,
            **kwargs,
        )
        self.has_chunked_loss = has_chunked_loss() and isinstance(self.model, CM3LeonForCausalLM)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and self.has_chunked_loss:
            inputs = inputs | {"loss_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)


def token_losses(vocabulary: Vocabulary) -> Callable:
    """For `preprocess_logits_for_metrics`: each row's summed losses of text and of image tokens, and their numbers."""

    def sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        is_image = vocabulary.is_image(targets)
        counted = torch.stack([~is_image & (targets >= 0), is_image])  # `(2, batch, length)`
        return torch.cat([(losses * counted).sum(2), counted.sum(2)]).T

    return sums


def perplexities(prediction: EvalPrediction) -> dict[str, float]:
    """Validation perplexity over all tokens, and over those of each modality (figure 3)."""
    text, image, texts, images = np.asarray(prediction.predictions, np.float64).sum(0)
    sums = {"perplexity": (text + image, texts + images), "text_perplexity": (text, texts)}
    sums["image_perplexity"] = (image, images)
    return {name: float(np.exp(loss / count)) for name, (loss, count) in sums.items() if count}
