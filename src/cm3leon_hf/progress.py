"""Progress bars over generated tokens."""

import torch
from tqdm.auto import tqdm
from transformers.generation import BaseStreamer


class TokenProgress(BaseStreamer):
    """
    A streamer that shows a progress bar, for batches of any size.

    Args:
        total (`int`): Tokens that each row will get.
        description (`str`): What the bar says.
    """

    def __init__(self, total: int, description: str):
        self.bar = tqdm(total=total, desc=description, unit="token")
        self.prompt_seen = False

    def put(self, value: torch.LongTensor) -> None:
        if self.prompt_seen:
            self.bar.update()
        self.prompt_seen = True  # the prompt comes first

    def end(self) -> None:
        self.bar.close()
