"""Pictures of a source to codes, so that training reads codes instead of pictures."""

from dataclasses import dataclass, field

import torch
from datasets import Features, Image, IterableDataset, List, Value

from ..images import read_image
from ..modeling_vqgan import CM3LeonVQGAN


@dataclass(eq=False)
class ImageTokenizer:
    """
    Encodes batches of rows for `datasets.map(batched=True)`; broken pictures are skipped and counted.

    Args:
        vqgan ([`CM3LeonVQGAN`]): The image tokenizer, on the device that it is to run on.
        image_processor: Its image processor.
        column (`str`): Column that holds the pictures, undecoded.
    """

    vqgan: CM3LeonVQGAN
    image_processor: object
    column: str = "image"
    skipped: int = 0
    usage: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.usage = torch.zeros(self.vqgan.config.num_embeddings, dtype=torch.long)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows with the column `codes` in place of the pictures; those with broken pictures are left out."""
        pictures = [self._read(stored) for stored in rows.pop(self.column)]
        kept = [index for index, picture in enumerate(pictures) if picture is not None]
        rows = {name: [values[index] for index in kept] for name, values in rows.items()}
        return rows | {"codes": self._codes([pictures[index] for index in kept])}

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
        kept = {name: kind for name, kind in rows.features.items() if name != self.column}
        return rows.cast_column(self.column, Image(decode=False)).map(
            self,
            batched=True,
            batch_size=batch_size,
            remove_columns=[self.column],
            features=Features(kept | {"codes": List(Value("uint16"))}),
        )

    def report(self) -> str:
        """How many pictures were encoded and skipped, how many codes they use, and the nats that a code carries."""
        pictures = int(self.usage.sum()) // self.vqgan.config.grid_size**2
        entropy = torch.special.entr(self.usage / self.usage.sum().clamp(min=1)).sum().item()
        return (
            f"{pictures} pictures, {self.skipped} skipped; {int((self.usage > 0).sum())} of {len(self.usage)} codes, "
            f"{entropy:.2f} nats a code"
        )
