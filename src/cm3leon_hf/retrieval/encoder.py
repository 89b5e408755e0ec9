"""The bi-encoder of retrieval: a frozen CLIP, and one vector for each document (paper, section 2.1)."""

import hashlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

try:
    import open_clip

    from . import shades  # noqa: F401  the trunk of the shipped ranker, which open_clip finds by name from here on
except ImportError as error:
    raise ImportError(
        "CLIP needs open_clip_torch; pip install 'cm3leon_hf[retrieval]' or 'cm3leon_hf[eval]'"
    ) from error

PATCHES = 7  # along one side of a picture, as ViT-B-32 sees it; what query dropout takes for an image's tokens
LOCAL = "local-dir:"
IMPORTED_BY = os.getpid()


class CLIPEncoder:
    """
    A frozen CLIP that turns texts, pictures and documents into vectors.

    It pickles as its arguments: whoever unpickles it loads the weights again.

    Args:
        model (`str`): A model of open_clip, such as `"ViT-B-32"`, or `"hf-hub:…"` or `"local-dir:…"`, which bring
            their own weights.
        pretrained (`str`, *optional*): open_clip's name of the weights, or their file.
        device (`str` or `torch.device`, *optional*): The accelerator when there is one, by default.
        dtype (`torch.dtype`, *optional*): By default bfloat16 on an accelerator and float32 on the CPU.
        batch_size (`int`): Texts or pictures in one forward pass.

    Attributes:
        name (`str`): The model, its weights and their fingerprint. A bank remembers it, and takes no other encoder.

    Raises:
        RuntimeError: by open_clip, if it does not know the model or cannot load its weights.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 256,
    ):
        self.arguments = (model, pretrained, device, dtype, batch_size)
        self.batch_size = batch_size
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        pretrained = None if ":" in model else pretrained
        self.model, self.transform = open_clip.create_model_from_pretrained(model, pretrained)
        self.name = f"{_label(model, pretrained)}@{fingerprint(self.model)}"
        self.model.eval().requires_grad_(False).to(self.device, self.dtype)
        self.tokenizer = open_clip.get_tokenizer(model)

    def __reduce__(self):
        return _reload, (type(self), *self.arguments)

    @cached_property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.embed_texts([""]).shape[1]

    def embed_texts(
        self, texts: list[str], rngs: list[np.random.Generator] | None = None, dropout: float = 0.2
    ) -> torch.Tensor:
        """
        Unit vectors of texts.

        Args:
            texts (`list[str]`): Cut at the model's context length.
            rngs (`list[np.random.Generator]`, *optional*): One for each text; with them, query dropout is on.
            dropout (`float`): Share of a text's tokens that query dropout removes, rounded to whole tokens.

        Returns:
            `torch.Tensor` of shape `(texts, dimension)`, float32, on the encoder's device.
        """

        def prepare(start: int, stop: int) -> torch.Tensor:
            tokens = self.tokenizer(texts[start:stop])
            return tokens if rngs is None else self._drop_tokens(tokens, rngs[start:stop], dropout)

        return self._embed(len(texts), prepare, self.model.encode_text)

    def embed_images(
        self, images: list[Image.Image], rngs: list[np.random.Generator] | None = None, dropout: float = 0.2
    ) -> torch.Tensor:
        """
        Unit vectors of pictures.

        Args:
            images (`list[PIL.Image.Image]`): Pictures in RGB.
            rngs (`list[np.random.Generator]`, *optional*): One for each picture; with them, query dropout is on.
            dropout (`float`): Share of a picture's 7×7 patches that query dropout blanks. Ours: the paper drops tokens
                of the query; an encoder of any kind can do without patches, and few can do without tokens.

        Returns:
            `torch.Tensor` of shape `(images, dimension)`, float32, on the encoder's device.
        """

        def prepare(start: int, stop: int) -> torch.Tensor:
            pixels = torch.stack([self.transform(image) for image in images[start:stop]])
            return (pixels if rngs is None else _blank_patches(pixels, rngs[start:stop], dropout)).to(self.dtype)

        return self._embed(len(images), prepare, self.model.encode_image)

    def encode(self, texts: list[str | None], images: list[Image.Image | None]) -> np.ndarray:
        """
        One vector for each document: the mean of its text's and its picture's unit vectors (section 2.1).

        The mean is not normalised again, so it is shorter the less text and picture agree. A document with one part
        only keeps that part's vector.

        Args:
            texts (`list[str | None]`): The documents' texts.
            images (`list[PIL.Image.Image | None]`): Their pictures, in RGB.

        Returns:
            `np.ndarray` of shape `(documents, dimension)`, float32.

        Raises:
            ValueError: if there are not as many texts as pictures, or a document has neither.
        """
        if len(texts) != len(images):
            raise ValueError(f"expected a text or None for each picture, got {len(texts)} for {len(images)}")
        parts = np.zeros(len(texts), np.float32)
        total = np.zeros((len(texts), self.dimension), np.float32)
        for embed, values in ((self.embed_texts, texts), (self.embed_images, images)):
            there = [row for row, value in enumerate(values) if value is not None]
            total[there] += embed([values[row] for row in there]).cpu().numpy()
            parts[there] += 1
        if not parts.all():
            raise ValueError(
                f"expected a text or a picture, got document {parts.argmin()} without either; leave it out"
            )
        return total / parts[:, None]

    @torch.no_grad()
    def _embed(self, count: int, prepare: Callable, encode: Callable) -> torch.Tensor:
        if not count:
            return torch.zeros(0, self.dimension, device=self.device)
        starts = range(0, count, self.batch_size)
        batches = [encode(prepare(start, start + self.batch_size).to(self.device)).float() for start in starts]
        return torch.nn.functional.normalize(torch.cat(batches), dim=-1)

    def _drop_tokens(self, tokens: torch.Tensor, rngs, dropout: float) -> torch.Tensor:
        """Tokens `(texts, length)` without some, closed up; what an empty text is made of is never dropped."""
        frame = self.tokenizer([""])[0]
        kept = torch.full_like(tokens, frame[-1])
        for row, (text, rng) in enumerate(zip(tokens, rngs)):
            words = (~torch.isin(text, frame)).nonzero().flatten().numpy()
            dropped = rng.choice(words, size=round(dropout * len(words)), replace=False)
            rest = np.delete(text.numpy(), dropped)
            kept[row, : len(rest)] = torch.from_numpy(rest)
        return kept


def _blank_patches(pixels: torch.Tensor, rngs, dropout: float) -> torch.Tensor:
    """Pixels `(images, 3, height, width)` with some patches of the mean colour, which is 0."""
    keep = torch.ones(len(pixels), PATCHES**2)
    for row, rng in zip(keep, rngs):
        row[torch.from_numpy(rng.choice(PATCHES**2, size=round(dropout * PATCHES**2), replace=False))] = 0
    keep = keep.view(-1, 1, PATCHES, PATCHES)
    return pixels * torch.nn.functional.interpolate(keep, size=pixels.shape[-2:], mode="nearest")


def _label(model: str, pretrained: str | None) -> str:
    """The name that goes into a bank: without folders, which are renamed and differ between machines."""
    if ":" in model:
        return LOCAL.rstrip(":") if model.startswith(LOCAL) else model
    return f"{model}/{Path(pretrained).name}" if pretrained else model


def fingerprint(model: torch.nn.Module) -> str:
    """Eight digits of the weights: one number of each tensor is enough to tell two trainings apart."""
    numbers = [weight.flatten()[:1].float() for weight in model.state_dict().values()]
    return hashlib.blake2b(torch.cat(numbers).cpu().numpy().tobytes(), digest_size=4).hexdigest()


def _reload(kind: type[CLIPEncoder], *arguments) -> CLIPEncoder:
    if os.getpid() != IMPORTED_BY:  # OpenMP's threads do not survive a fork; waiting for them would never end
        torch.set_num_threads(1)
    return kind(*arguments)


__all__ = ["CLIPEncoder"]
