"""Supervised fine-tuning: TRL's SFTTrainer over documents that are ready."""

import datasets
import torch
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import Dataset
from trl import SFTTrainer

from ..modeling_loss import has_chunked_loss
from .faults import FiniteStepsMixin
from .resuming import ExactResumeMixin

READY = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})


class InstructionTrainer(ExactResumeMixin, FiniteStepsMixin, SFTTrainer):
    """
    TRL's SFTTrainer for [`~cm3leon_hf.data.pretraining.CM3Rows`] and [`~cm3leon_hf.data.stream.PackedStream`].

    TRL takes nothing but a `datasets.Dataset`, looks at one row of it, and leaves it alone where
    `dataset_kwargs={"skip_prepare_dataset": True}`. So it is shown a row of the form that ours have, and the stock
    Trainer below it gets ours, which know the epoch and draw other spans in each.

    On GPUs the loss is TRL's, computed without holding logits, and its metrics with it. On a CPU TRL scores every
    position in float32 and many passes, so training takes the model's own `loss_only`, and logs no entropy or accuracy.

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
        plain = self.args.loss_type == "nll" and self.label_smoother is None and self.compute_loss_func is None
        self.own_loss = plain and has_chunked_loss() and self.args.device.type == "cpu"

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.streams and not self.own_loss:  # TRL takes the rows of a packed batch for one
            rows, length = inputs["input_ids"].shape
            self._total_train_tokens += (rows - 1) * length * self.args.world_size
        # autocast casts what adapters read; a cast of PEFT's before it would keep a copy for each of them
        with disable_input_dtype_casting(model, active=self.accelerator.native_amp):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not (self.own_loss and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)  # padding is on the right, where no token looks: causal attention is fast without a mask
        read = inputs.pop("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        self._total_train_tokens += int(self.accelerator.gather(read).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        inputs = inputs | {"loss_only": True, "use_cache": False}
        return super(SFTTrainer, self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
