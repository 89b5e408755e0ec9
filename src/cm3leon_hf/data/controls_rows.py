"""From rows with pictures to the same rows with what was seen in them; broken pictures are skipped and counted."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from PIL import Image, ImageOps

from ..images import read_image
from . import controls_extra as extra


@dataclass(eq=False)
class Annotator:
    """
    Adds columns with what it sees in pictures to batches of rows, for `datasets.map(batched=True)`.

    It pickles as its arguments, so that `datasets` knows by them whether it has done a map before, and a process that
    unpickles it loads its own model.

    Args:
        image_column (`str`): Column that holds the pictures, decoded or not.
        size (`int`, *optional*): Length to which a picture's shorter side is scaled first. Lines one pixel wide survive
            an image tokenizer only when they are drawn at its own resolution.

    Attributes:
        skipped (`int`): Broken pictures so far, whose rows were left out.
    """

    image_column: str = "image"
    size: int | None = None
    skipped: int = field(default=0, init=False)

    @property
    def features(self) -> dict:
        """The columns that are added, and their types."""
        raise NotImplementedError

    def annotate(self, pictures: list[Image.Image]) -> dict[str, list]:
        """The added columns for pictures in RGB."""
        raise NotImplementedError

    def __reduce__(self):
        return type(self), tuple(getattr(self, argument.name) for argument in fields(self) if argument.init)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows with the added columns; those with broken pictures are left out."""
        pictures = [self.read(stored) for stored in rows[self.image_column]]
        whole = [index for index, picture in enumerate(pictures) if picture is not None]
        kept = {name: [values[index] for index in whole] for name, values in rows.items()}
        return kept | (
            self.annotate([pictures[index] for index in whole]) if whole else dict.fromkeys(self.features, [])
        )

    def read(self, stored) -> Image.Image | None:
        """The picture of a cell, scaled to `size`; `None`, counted, if it is broken."""
        try:
            picture = read_image((stored["bytes"] or stored["path"]) if isinstance(stored, dict) else stored)
        except ValueError as error:
            print(f"skipped: {error}")
            self.skipped += 1
            return None
        scale = self.size / min(picture.size) if self.size else 1
        return picture if scale == 1 else ImageOps.scale(picture, scale, Image.Resampling.BICUBIC)


@dataclass(eq=False)
class Control(Annotator):
    """A picture's control signal, in a column of its name: a picture of the same size, in mode L or RGB."""

    name: ClassVar[str]

    @property
    def features(self) -> dict:
        return {self.name: extra.Image()}

    def annotate(self, pictures: list[Image.Image]) -> dict[str, list]:
        return {self.name: self.draw(pictures)}

    def draw(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Control pictures of pictures in RGB."""
        raise NotImplementedError


def annotated(rows, annotators: list[Annotator], batch_size: int = 16):
    """
    A data set, or a stream, with the columns of annotators; rows with broken pictures are left out.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Rows with pictures.
        annotators (`list[Annotator]`): What adds the columns, all from the same pictures.
        batch_size (`int`): Rows at a time, and pictures in one forward pass.

    Returns:
        The rows; a stream's pictures stay undecoded, since a stream hands on what its last map returned.

    Raises:
        ValueError: if the pictures' column is not there, or one of the added columns already is.
    """
    column, features = annotators[0].image_column, rows.features
    if column not in features:
        raise ValueError(f"expected the column {column!r} with pictures, got {[*features]}; name it with image_column")
    for annotator in annotators:
        if taken := sorted(annotator.features.keys() & features):
            raise ValueError(f"expected no column {taken[0]!r} yet, got {[*features]}; remove or rename it first")
        features = extra.Features(features | annotator.features)

    def annotate(batch: dict[str, list]) -> dict[str, list]:
        for annotator in annotators:
            batch = annotator(batch)
        return batch

    undecoded = rows.cast_column(column, extra.Image(decode=False))  # broken pictures come as their bytes
    return undecoded.map(
        annotate, batched=True, batch_size=batch_size, features=extra.Features(features | {column: extra.Image()})
    )
