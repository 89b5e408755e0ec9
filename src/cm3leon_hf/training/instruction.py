"""Supervised fine-tuning: TRL's SFTTrainer over documents that are ready."""

import datasets
from torch.utils.data import Dataset
from trl import SFTTrainer

from .faults import FiniteStepsMixin
from .resuming import ExactResumeMixin

READY = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})


class InstructionTrainer(ExactResumeMixin, FiniteStepsMixin, SFTTrainer):
    """
    TRL's SFTTrainer for [`~cm3leon_hf.data.pretraining.CM3Rows`] and [`~cm3leon_hf.data.stream.PackedStream`].

    TRL takes nothing but a `datasets.Dataset`, looks at one row of it, and leaves it alone where
    `dataset_kwargs={"skip_prepare_dataset": True}`. So it is shown a row of the form that ours have, and the stock
    Trainer below it gets ours, which know the epoch and draw other spans in each.

    TRL computes the loss without holding logits, and its metrics in the same pass, so the model's `loss_only` would add
    nothing here.

    Args:
        train_dataset ([`CM3Rows`] or [`PackedStream`]): A stream keeps its documents apart (`apart=True`).
        eval_dataset ([`CM3Rows`], *optional*): Documents to measure the loss on.
        max_skipped_steps (`int`): See [`FiniteStepsMixin`].

    The other arguments are those of `trl.SFTTrainer`.
    """

    def __init__(self, *args, train_dataset: Dataset, eval_dataset: Dataset | None = None, **kwargs):
        shown = {"train_dataset": READY, "eval_dataset": None if eval_dataset is None else READY}
        super().__init__(*args, **shown, **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.streams:  # TRL takes the rows of a packed batch for one
            rows, length = inputs["input_ids"].shape
            self._total_train_tokens += (rows - 1) * length * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)
