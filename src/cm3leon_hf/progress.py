"""What one sees while tokens are generated: a progress bar, or the pictures so far."""

from collections.abc import Callable

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.generation import BaseStreamer

from .vocabulary import Vocabulary


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
    A streamer that shows the pictures so far, white where no token stands yet; a hole that is filled, in its picture.

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
        self.prompts: torch.LongTensor | None = None
        self.tokens: list[torch.LongTensor] = []

    def put(self, value: torch.LongTensor) -> None:
        if self.prompts is None:  # which come first
            self.prompts = value
            return
        self.tokens.append(value.flatten())
        if len(self.tokens) % self.every == 0:
            self.show(self.pictures())

    def pictures(self) -> list[Image.Image]:
        """The pictures so far."""
        vocab = self.processor.vocabulary
        rows = torch.cat([self.prompts, torch.stack(self.tokens, dim=1)], dim=1)
        white = vocab.codes_to_ids(self.white[0])
        drawn = torch.stack([unfinished_image(row, white, vocab) for row in rows])
        return self.processor.decode_images(vocab.ids_to_codes(drawn))

    def end(self) -> None:
        if len(self.tokens) % self.every:
            self.show(self.pictures())


def unfinished_image(ids: torch.LongTensor, white: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """The image ids that a row `(length,)` draws behind its last `<break>`, or fills there, the rest of them white."""
    image = ids[int((ids == vocabulary.break_id).nonzero()[-1]) + 1 :]
    behind = image[:0]
    if (image == vocabulary.infill_id).any():
        hole, infill = (int((image == mark).nonzero()[0]) for mark in (vocabulary.mask_id, vocabulary.infill_id))
        image, behind = torch.cat([image[:hole], image[infill + 1 :]]), image[hole + 1 : infill]
    return torch.cat([image, white[len(image) : len(white) - len(behind)], behind])
