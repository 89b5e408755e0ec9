"""How the recipes of this folder train: a stopped run goes on where it was, and what was tuned is saved at its end."""

from transformers import Trainer

from cm3leon_hf import CM3LeonProcessor
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.faults import StopOnSignal
from cm3leon_hf.training.saving import save_tuned


def train_and_save(trainer: Trainer, processor: CM3LeonProcessor) -> None:
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(trainer.args.output_dir))
    if not stop.stopped:
        save_tuned(trainer, processor)
    trainer.accelerator.end_training()
