"""How well pictures fit texts, by CLIP."""

import torch
from PIL import Image

try:
    import open_clip
except ImportError as error:
    raise ImportError("scoring by CLIP needs open_clip_torch; pip install 'cm3leon_hf[eval]'") from error


class CLIPScorer:
    """
    Cosine similarity of pictures and texts under a frozen CLIP.

    Args:
        model (`str`): A model of open_clip, such as `"ViT-B-32"`, or `"hf-hub:…"` or `"local-dir:…"`, which bring
            their own weights.
        pretrained (`str`, *optional*): open_clip's name of the weights, or their file.
        device (`str` or `torch.device`, *optional*): The accelerator when there is one, by default.

    Raises:
        RuntimeError: by open_clip, if it does not know the model or cannot load its weights.
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str | None = "openai", device=None):
        self.device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.model, self.transform = open_clip.create_model_from_pretrained(model, pretrained, device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(model)

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Unit vectors `(images, width)`."""
        pixels = torch.stack([self.transform(image) for image in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors `(texts, width)`."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)

    def __call__(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """
        The similarity of each picture to its own text, in [-1, 1].

        Raises:
            ValueError: if there are not as many texts as pictures.
        """
        if len(images) != len(texts) or not images:
            raise ValueError(f"expected a text for each picture, got {len(texts)} texts for {len(images)} pictures")
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1).tolist()
