"""Runs that go on where they were stopped, to the last bit."""

from pathlib import Path

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from ..data.stream import PackedStream, stack
from .faults import StopOnSignal


class ExactResumeMixin:
    """
    A Trainer that stops on a signal and goes on exactly, over [`~cm3leon_hf.data.stream.PackedStream`] as well.

    A stream's state is part of each checkpoint, for each process, so that a run that goes on with as many processes
    and workers reads what an unbroken one reads. Rows in a data set are skipped by the Trainer itself. Needs
    [`FiniteStepsMixin`], whose count is kept as well.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self.loader = None

    @property
    def streams(self) -> bool:
        return isinstance(self.train_dataset, PackedStream)

    def get_train_dataloader(self):
        args = self.args
        args.ignore_data_skip = self.streams
        if not self.streams:
            return super().get_train_dataloader()
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
