"""The one place that knows id ranges, special tokens, and how codes and ids correspond."""

from dataclasses import dataclass

import torch

PAD, EOS, BREAK, MASK, INFILL, IMAGE = "<pad>", "<eos>", "<break>", "<mask>", "<infill>", "<image>"
CONTROL_TOKENS = (PAD, EOS, BREAK, MASK, INFILL, IMAGE)
GENERATION_MODES = ("text", "image", "interleaved")


@dataclass(frozen=True)
class Vocabulary:
    """
    Layout of the ids: text first, special tokens at its start, then one id for each image code (paper, section 2.1).

    Args:
        text_size (`int`): Number of text ids, special tokens included; the ids are 0 to `text_size - 1`.
        image_size (`int`): Number of codes in the VQGAN's codebook.
        grid_size (`int`): Codes along one side of an image.
        num_locations (`int`): Bins of the box coordinates `<loc_0>`, `<loc_1>`, …
        num_masks (`int`): Spans of a document that can be masked. The first is `<mask>` and `<infill>`, as the paper
            writes them and as prompts have them; ours: further ones are `<mask:1>`, … and `<infill:1>`, …

    Raises:
        ValueError: if the text ids cannot hold the special tokens.
    """

    text_size: int = 56320
    image_size: int = 8192
    grid_size: int = 32
    num_locations: int = 256
    num_masks: int = 1

    def __post_init__(self):
        special = len(CONTROL_TOKENS) + self.num_locations + 2 * (self.num_masks - 1)
        if self.text_size < special:
            raise ValueError(
                f"expected at least {special} text ids for the special tokens, got {self.text_size}; "
                "raise text_vocab_size"
            )

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens in the order of their ids, which begin at 0."""
        further = range(1, self.num_masks)
        return [*CONTROL_TOKENS, *self.location_ids, *(f"{mark[:-1]}:{i}>" for mark in (MASK, INFILL) for i in further)]

    @property
    def size(self) -> int:
        """Number of ids in all: rows of the embedding."""
        return self.text_size + self.image_size

    @property
    def image_length(self) -> int:
        """Number of image tokens of one image."""
        return self.grid_size**2

    @property
    def pad_id(self) -> int:
        return CONTROL_TOKENS.index(PAD)

    @property
    def eos_id(self) -> int:
        """Ends a document, and begins one."""
        return CONTROL_TOKENS.index(EOS)

    @property
    def break_id(self) -> int:
        """Stands between text and image."""
        return CONTROL_TOKENS.index(BREAK)

    @property
    def mask_id(self) -> int:
        """Stands for a removed span; in place of the text, for "no text" in guidance."""
        return CONTROL_TOKENS.index(MASK)

    @property
    def infill_id(self) -> int:
        """Announces the removed span's content."""
        return CONTROL_TOKENS.index(INFILL)

    @property
    def mask_ids(self) -> list[int]:
        """The masks of a document's first, second, … span."""
        further = len(CONTROL_TOKENS) + self.num_locations
        return [self.mask_id, *range(further, further + self.num_masks - 1)]

    @property
    def infill_ids(self) -> list[int]:
        """What announces the content of a document's first, second, … span."""
        further = len(CONTROL_TOKENS) + self.num_locations + self.num_masks - 1
        return [self.infill_id, *range(further, further + self.num_masks - 1)]

    @property
    def location_ids(self) -> dict[str, int]:
        """The tokens of box coordinates, `<loc_0>` first, and their ids."""
        return {f"<loc_{index}>": len(CONTROL_TOKENS) + index for index in range(self.num_locations)}

    @property
    def image_id(self) -> int:
        """The processor's placeholder for a whole image; never reaches the model."""
        return CONTROL_TOKENS.index(IMAGE)

    @property
    def image_ids(self) -> slice:
        """The ids that are image tokens."""
        return slice(self.text_size, self.size)

    def is_image(self, ids: torch.LongTensor) -> torch.BoolTensor:
        """Which ids are image tokens; same shape."""
        return ids >= self.text_size

    def codes_to_ids(self, codes: torch.LongTensor) -> torch.LongTensor:
        """
        VQGAN codes to vocabulary ids; same shape.

        Raises:
            ValueError: if a code lies outside the codebook.
        """
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.image_size):
            raise ValueError(
                f"expected codes in [0, {self.image_size}), got {codes.min().item()} to {codes.max().item()}; "
                "encode the image with this model's VQGAN"
            )
        return codes + self.text_size

    def ids_to_codes(self, ids: torch.LongTensor) -> torch.LongTensor:
        """
        Vocabulary ids to VQGAN codes; same shape.

        Raises:
            ValueError: if an id is no image token.
        """
        if ids.numel() and not (self.text_size <= ids.min() and ids.max() < self.size):
            raise ValueError(
                f"expected image ids in [{self.text_size}, {self.size}), got {ids.min().item()} to "
                f"{ids.max().item()}; generate with generation_mode='image'"
            )
        return ids - self.text_size
