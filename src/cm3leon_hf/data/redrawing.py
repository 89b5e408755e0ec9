"""Codes of pictures of which a language model redrew some, for a VQGAN decoder that has to draw from its mistakes."""

from dataclasses import dataclass

import torch
from transformers import TopPLogitsWarper

from ..images import read_image
from ..modeling_cm3leon import CM3LeonForCausalLM
from ..processing_cm3leon import CM3LeonProcessor


@dataclass(eq=False)
class RedrawnCodes:
    """
    Rows to pixels and codes, for `Dataset.set_transform`.

    Of each picture's codes a share drawn from [0, `share`] is replaced by what the model draws in their place, behind
    the caption and the picture's own codes up to there. Ours: a VQGAN's decoder sees only the codes of its encoder,
    which always fit each other; those that a language model draws do not, and are decoded to smears.

    Args:
        model ([`CM3LeonForCausalLM`]): Draws.
        processor ([`CM3LeonProcessor`]): The model's; its image processor makes the pixels.
        share (`float`): Largest share of a picture's codes that is redrawn, in [0, 1]; 0 leaves all as they are.
        top_p (`float`): Nucleus that codes are drawn from.
    """

    model: CM3LeonForCausalLM
    processor: CM3LeonProcessor
    share: float = 0.5
    top_p: float = 0.9

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"expected a share in [0, 1], got {self.share}; half is a good start")

    def __call__(self, rows: dict[str, list]) -> dict[str, torch.Tensor]:
        """
        Rows with the columns `image`, `captions` and `codes` to `pixel_values` of shape `(batch, channels, height,
        width)`, in [-1, 1], and `codes` of shape `(batch, grid_size ** 2)`.
        """
        pictures = [read_image(image) for image in rows["image"]]
        codes = torch.tensor(rows["codes"])
        if self.share:
            codes = self.redraw([captions[0] for captions in rows["captions"]], codes)
        return {"pixel_values": self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]} | {
            "codes": codes
        }

    @torch.no_grad()
    def redraw(self, captions: list[str], codes: torch.LongTensor) -> torch.LongTensor:
        """Codes `(batch, grid_size ** 2)` of pictures with these captions, some of them the model's."""
        vocabulary = self.processor.vocabulary
        prompts, ids = self.processor.for_text_to_image(captions), vocabulary.codes_to_ids(codes)
        read = {
            "input_ids": torch.cat([prompts["input_ids"], ids], dim=1),
            "attention_mask": torch.cat([prompts["attention_mask"], torch.ones_like(ids)], dim=1),
        }
        read = {name: values.to(self.model.device) for name, values in read.items()}
        logits = self.model(**read, logits_to_keep=ids.shape[1] + 1).logits[:, :-1, vocabulary.image_ids]
        scores = TopPLogitsWarper(self.top_p)(None, logits.flatten(0, 1).float())
        drawn = scores.softmax(-1).multinomial(1).view_as(codes).to(codes.device)
        redrawn = torch.rand(codes.shape) < torch.rand(len(codes), 1) * self.share
        return torch.where(redrawn, drawn, codes)
