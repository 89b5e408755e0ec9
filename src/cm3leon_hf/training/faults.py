"""What ends or spoils a run before its time: a signal to stop, and losses that are not finite."""

import logging
import math
import signal
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """
    On SIGTERM, finishes the step, saves and stops; all processes at the same step, whichever of them got the signal.

    Unlike `enable_jit_checkpoint` of transformers, which also saves within a step, when the batches of that step have
    been taken from the data and not been trained on.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator, self.stopped = trainer.accelerator, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())

    def on_step_end(self, args, state, control, **kwargs):
        if self.accelerator.check_trigger():
            logger.warning("SIGTERM: saving step %d and stopping", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)


class FiniteStepsMixin:
    """
    A Trainer that skips steps whose gradient is not finite, as it is when the loss is not, and keeps their batches.

    Each process writes what it had read to `output_dir/not_finite/`. The weights and the optimizer stay as they were.
    DeepSpeed's engine takes its step itself, so there the step is reported and counted, but not skipped.

    Args:
        max_skipped_steps (`int`): Steps to skip at most in a run, resumptions included.
    """

    def __init__(self, *args, max_skipped_steps: int = 10, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_skipped_steps, self.skipped_steps, self.batches = max_skipped_steps, 0, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._skip_step(model, norm)
        self.batches = []
        return norm

    def _skip_step(self, model, norm) -> None:
        model.zero_grad(set_to_none=True)  # without gradients an optimizer changes nothing
        self.skipped_steps += 1
        folder = Path(self.args.output_dir) / "not_finite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.state.global_step + 1}-rank-{self.args.process_index}.pt"
        torch.save([{name: value.cpu() for name, value in batch.items()} for batch in self.batches], path)
        logger.warning("step %d skipped: gradient norm %s; its batch is in %s", self.state.global_step + 1, norm, path)
        if self.skipped_steps > self.max_skipped_steps:
            raise FloatingPointError(
                f"expected at most {self.max_skipped_steps} steps whose gradient is not finite, got "
                f"{self.skipped_steps}; look at the batches in {folder}, lower learning_rate, or raise "
                "max_skipped_steps, then go on from the last checkpoint"
            )
