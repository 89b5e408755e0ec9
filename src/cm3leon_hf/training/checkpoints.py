"""Which checkpoint a stopped run goes on from."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_whole_checkpoint(output_dir: str) -> str | None:
    """
    The last checkpoint that was written to its end, or `None`.

    The Trainer writes its state last, so a folder without it, or with half of it, is what a run left that was stopped
    while saving.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    newest_first = sorted(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    return next((str(path) for path in newest_first if _is_json(path / TRAINER_STATE_NAME)), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
