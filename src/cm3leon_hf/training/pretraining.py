"""The Trainer of pretraining: streams that resume exactly, faults, perplexity per modality."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import EvalPrediction

from ..data.stream import PackedStream, stack
from ..loss_cm3leon import has_chunked_loss
from ..modeling_cm3leon import CM3LeonForCausalLM
from ..vocabulary import Vocabulary
from .faults import FiniteStepsMixin, StopOnSignal
from .throughput import ThroughputTrainer


class PretrainingTrainer(FiniteStepsMixin, ThroughputTrainer):
    """
    The stock Trainer for [`~cm3leon_hf.data.stream.PackedStream`], and for data sets of rows.

    A stream's state is part of each checkpoint, for each process, so that a run that goes on with as many processes
    and workers reads what an unbroken one reads. Rows in a data set are skipped by the Trainer itself.

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
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self.args.ignore_data_skip = self.streams
        self.loader = None
        self.has_chunked_loss = has_chunked_loss() and isinstance(self.model, CM3LeonForCausalLM)

    @property
    def streams(self) -> bool:
        return isinstance(self.train_dataset, PackedStream)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and self.has_chunked_loss:
            inputs = inputs | {"loss_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self):
        if not self.streams:
            return super().get_train_dataloader()
        args = self.args
        self.loader = StatefulDataLoader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            collate_fn=stack,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        )
        return self.loader

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = {"skipped_steps": self.skipped_steps, "data": self.loader.state_dict() if self.streams else None}
        torch.save(state, self._state_file(output_dir))
        self.accelerator.wait_for_everyone()  # the Trainer's state is written last, and makes the checkpoint whole

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._state_file(checkpoint)
        if not path.exists():
            raise ValueError(
                f"expected {path} to go on from, got a checkpoint of another number of processes; use as many as before"
            )
        state = torch.load(path, weights_only=False)
        self.skipped_steps = state["skipped_steps"]
        if self.streams:
            self.loader.load_state_dict(state["data"])

    def _state_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"pretraining_state_{self.args.process_index}.pt"


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
