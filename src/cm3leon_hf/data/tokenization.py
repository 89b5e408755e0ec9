"""Pictures of a source to codes, so that training reads codes instead of pictures."""

from dataclasses import dataclass, field

import torch
from datasets import Features, Image, IterableDataset, List, Value
from torchvision.transforms.v2 import InterpolationMode, RandomAffine

from ..images import read_image
from ..modeling_vqgan import CM3LeonVQGAN

MOVED = RandomAffine(
    degrees=0, translate=(0.05, 0.05), scale=(0.85, 1.08), interpolation=InterpolationMode.BICUBIC, fill=255
)


@dataclass(eq=False)
class ImageTokenizer:
    """
    Encodes batches of rows for `datasets.map(batched=True)`; broken pictures are skipped and counted.

    Args:
        vqgan ([`CM3LeonVQGAN`]): The image tokenizer, on the device that it is to run on.
        image_processor: Its image processor.
        column (`str`): Column that holds the pictures, undecoded.
        moved_copies (`int`): How often each row stands there once more, its picture moved by up to a twentieth of its
            side over white and scaled by 0.85 to 1.08. Ours, for small corpora: a picture's codes change with its
            place, so a model cannot learn them by heart.
        keep_images (`bool`): Whether rows keep their pictures, unmoved, beside the codes.
    """

    vqgan: CM3LeonVQGAN
    image_processor: object
    column: str = "image"
    moved_copies: int = 0
    keep_images: bool = False
    skipped: int = 0
    usage: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.usage = torch.zeros(self.vqgan.config.num_embeddings, dtype=torch.long)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows with the column `codes`; those with broken pictures are left out."""
        pictures = [self._read(stored) for stored in rows[self.column]]
        whole = [index for index, picture in enumerate(pictures) if picture is not None]
        drawn = [pictures[index] for index in whole]
        drawn += [MOVED(picture) for _ in range(self.moved_copies) for picture in drawn]
        kept = whole * (1 + self.moved_copies)
        names = [name for name in rows if self.keep_images or name != self.column]
        return {name: [rows[name][index] for index in kept] for name in names} | {"codes": self._codes(drawn)}

    def _read(self, stored: dict):
        """The picture of an undecoded cell, whose bytes are in the data set or, for a folder of images, in a file."""
        try:
            return read_image(stored["bytes"] or stored["path"])
        except ValueError as error:
            print(f"skipped: {error}")
            self.skipped += 1

    def _codes(self, pictures: list) -> list:
        if not pictures:
            return []
        codes = self.vqgan.encode(self.image_processor(pictures, return_tensors="pt")["pixel_values"]).cpu()
        self.usage += codes.flatten().bincount(minlength=len(self.usage))
        return codes.tolist()

    def encode(self, rows: IterableDataset, batch_size: int) -> IterableDataset:
        """
        The rows of a stream with codes in place of pictures, encoded as they are read.

        Raises:
            ValueError: if the stream has no column of this name.
        """
        if self.column not in rows.column_names:
            raise ValueError(
                f"expected the column {self.column!r} with pictures, got {rows.column_names}; name it with image_column"
            )
        kept = {name: kind for name, kind in rows.features.items() if self.keep_images or name != self.column}
        return rows.cast_column(self.column, Image(decode=False)).map(
            self,
            batched=True,
            batch_size=batch_size,
            remove_columns=[] if self.keep_images else [self.column],
            features=Features(kept | {"codes": List(Value("int32"))}),
        )

    def report(self) -> str:
        """How many pictures were encoded and skipped, how many codes they use, and the nats that a code carries."""
        pictures = int(self.usage.sum()) // self.vqgan.config.grid_size**2
        entropy = torch.special.entr(self.usage / self.usage.sum().clamp(min=1)).sum().item()
        return (
            f"{pictures} pictures, {self.skipped} skipped; {int((self.usage > 0).sum())} of {len(self.usage)} codes, "
            f"{entropy:.2f} nats a code"
        )
