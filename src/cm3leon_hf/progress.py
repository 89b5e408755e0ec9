"""What one sees while tokens are generated: a progress bar, or the pictures so far."""

from collections.abc import Callable

import torch
from PIL import Image
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


class PicturePreview(BaseStreamer):
    """
    A streamer that shows the pictures so far, white where no token stands yet.

    Args:
        processor ([`CM3LeonProcessor`]): Decodes tokens.
        show (`Callable`): Takes the list of pictures, one for each row.
        every (`int`, *optional*): Tokens from one showing to the next; a row of the grid by default.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(self, processor, show: Callable[[list[Image.Image]], None], every: int | None = None):
        self.every = processor.image_grid_size if every is None else every
        if self.every < 1:
            raise ValueError(f"expected to show pictures every 1 token or more, got every {every}")
        self.processor, self.show = processor, show
        self.white = processor.encode_images(Image.new("RGB", (64, 64), "white"))
        self.tokens: list[torch.LongTensor] = []
        self.prompt_seen = False

    def put(self, value: torch.LongTensor) -> None:
        if self.prompt_seen:
            self.tokens.append(value.flatten())
            if len(self.tokens) % self.every == 0:
                self.show(self.pictures())
        self.prompt_seen = True  # the prompt comes first

    def pictures(self) -> list[Image.Image]:
        """The pictures so far."""
        drawn = self.processor.vocabulary.ids_to_codes(torch.stack(self.tokens, dim=1))
        codes = self.white.repeat(len(drawn), 1)
        codes[:, : drawn.shape[1]] = drawn
        return self.processor.decode_images(codes)

    def end(self) -> None:
        if len(self.tokens) % self.every:
            self.show(self.pictures())
