"""How well pictures fit texts, by CLIP."""

import numpy as np
import torch
from PIL import Image

from ..retrieval.encoder import CLIPEncoder

WEIGHT = 2.5


class CLIPScorer(CLIPEncoder):
    """
    Cosine similarity of pictures and texts under a frozen CLIP, in float32.

    Args:
        model (`str`): A model of open_clip, such as `"ViT-B-32"`, or `"hf-hub:…"` or `"local-dir:…"`, which bring
            their own weights.
        pretrained (`str`, *optional*): open_clip's name of the weights, or their file.
        device (`str` or `torch.device`, *optional*): The accelerator when there is one, by default.

    Attributes:
        scale (`float`): What similarities are multiplied by to be the logits that this CLIP was trained with.

    Raises:
        RuntimeError: by open_clip, if it does not know the model or cannot load its weights.
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str | None = "openai", device=None):
        super().__init__(model, pretrained, device, torch.float32)
        self.arguments = (model, pretrained, device)
        self.scale = self.model.logit_scale.exp().item()

    def __call__(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """
        The similarity of each picture to its own text, in [-1, 1].

        Raises:
            ValueError: if there are not as many texts as pictures.
        """
        if len(images) != len(texts) or not images:
            raise ValueError(f"expected a text for each picture, got {len(texts)} texts for {len(images)} pictures")
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1).tolist()


def clip_score(similarities) -> np.ndarray:
    """
    CLIPScore of each picture: `2.5 * max(cosine, 0)` (Hessel et al. 2021); the mean is the score of a set.

    Ours: without the prefix "A photo depicts", which that paper puts in front of a caption. Where others report
    `100 * cosine`, multiply by 40.

    Args:
        similarities (sequence of `float`): Cosines, by [`CLIPScorer`].
    """
    return WEIGHT * np.maximum(np.asarray(similarities, np.float64), 0)
