"""Which checkpoint a stopped run goes on from."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_whole_checkpoint(output_dir: str) -> str | None:
    """
    The last checkpoint that was written to its end, or `None`.

    The Trainer writes its state last, so a folder without it is what a run left that was stopped while saving.
    """
    whole = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None
