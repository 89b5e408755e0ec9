"""The processor: text and pictures to ids, ids to text and pictures."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .images import read_image
from .modeling_vqgan import CM3LeonVQGAN
from .processing_infilling import fill_image, fill_text, split_images
from .processing_prompts import CHAT_TEMPLATE, IMAGE_TO_TEXT
from .processing_tasks import CM3LeonTasksMixin
from .vocabulary import GENERATION_MODES, IMAGE, MASK, Vocabulary

VQGAN_FOLDER = "vqgan"


class CM3LeonProcessor(CM3LeonTasksMixin, ProcessorMixin):
    """
    Joins an image processor, a text tokenizer and a VQGAN.

    It puts real image ids into `input_ids`, so `labels = input_ids` is right as it stands.

    Args:
        image_processor (`BaseImageProcessor`): Makes pixels in [-1, 1] of the VQGAN's resolution.
        tokenizer (`PreTrainedTokenizerBase`): Byte-level BPE whose ids begin with the special tokens.
        vqgan ([`CM3LeonVQGAN`], *optional*): Image tokenizer; without it only text and codes can be processed.
        text_vocab_size (`int`): Text ids of the model, special tokens included.
        image_vocab_size (`int`): Image ids of the model.
        image_grid_size (`int`): Image tokens along one side.
        chat_template (`str`, *optional*): Jinja template of the message format.

    Raises:
        ValueError: if the tokenizer or the VQGAN does not fit the vocabulary.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        vqgan: CM3LeonVQGAN | None = None,
        text_vocab_size: int = 56320,
        image_vocab_size: int = 8192,
        image_grid_size: int = 32,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.text_vocab_size = text_vocab_size
        self.image_vocab_size = image_vocab_size
        self.image_grid_size = image_grid_size
        tokenizer.padding_side = "left"
        _check_tokenizer(tokenizer, self.vocabulary)
        self.vqgan = self._fitting(vqgan) if vqgan is not None else None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.text_vocab_size, self.image_vocab_size, self.image_grid_size)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        audio=None,
        image_codes: torch.LongTensor | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        retrieved: list[list[dict]] | None = None,
    ) -> BatchFeature:
        """
        Makes ids of text and images.

        Args:
            images (picture or list, *optional*): Anything [`~cm3leon_hf.images.read_image`] reads.
            text (`str` or `list[str]`, *optional*): Each `<image>` in it is replaced by an image. Images without a
                place in the text are described: the text, if any, becomes the instruction of an image-to-text prompt.
            image_codes (`torch.LongTensor` of shape `(images, image_length)`, *optional*): Codes in place of images.
            padding (`bool` or `str`): As in transformers; on the left.
            return_tensors (`str`, *optional*): `"pt"` for tensors, `None` for lists.
            add_special_tokens (`bool`): Whether a text that does not begin with `<eos>` gets it.
            retrieved (`list[list[dict]]`, *optional*): Documents to put in front of each text, the best first, as
                `with_retrieved` takes them; a picture's positions stay free behind it.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask`, `(batch, length)`.

        Raises:
            ValueError: for nothing, an empty text, videos or audio, a picture that cannot be read, codes of another
                grid or outside the codebook, or more or fewer images than places.
        """
        if videos is not None or audio is not None:
            raise ValueError("expected text and images, got videos or audio, which CM3Leon does not read; drop them")
        codes = self._codes(images, image_codes)
        count = 0 if codes is None else len(codes)
        texts = [text] if isinstance(text, str) else list(text) if text is not None else [""] * count
        if not texts or not all(isinstance(t, str) and (count or t.strip()) for t in texts):
            raise ValueError("expected texts that are not empty, or images, got neither; say what you want to see")
        if count and not any(IMAGE in t for t in texts):
            texts = [t if MASK in t else f"{t}{IMAGE_TO_TEXT}" for t in texts]
        image_ids = self.vocabulary.codes_to_ids(codes).tolist() if count else []
        if retrieved is None:
            return self._batch(texts, image_ids, padding, return_tensors, add_special_tokens)
        plain = self._batch(texts, image_ids, padding, None, add_special_tokens)
        room = self.tokenizer.model_max_length - self.vocabulary.image_length
        return self.with_retrieved(plain, retrieved, room, padding, return_tensors)

    def encode_images(self, images) -> torch.LongTensor:
        """Pictures to codes `(images, image_length)`, on the CPU."""
        pictures = [read_image(image) for image in _flatten(images)]
        if not pictures:
            raise ValueError("expected at least one image, got an empty list; leave images out for text alone")
        pixel_values = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return self._needed_vqgan().encode(pixel_values).cpu()

    def decode_images(self, codes: torch.LongTensor) -> list[Image.Image]:
        """Codes `(images, image_length)` to pictures."""
        pixels = self._needed_vqgan().decode(codes).float().cpu()
        levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(level) for level in levels]

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image] | list[list[str | Image.Image]]:
        """
        Ids from `generate` to text or pictures.

        Args:
            generated_outputs (`torch.LongTensor` of shape `(batch, length)` or `(length,)`): Prompts included.
            skip_special_tokens (`bool`): Whether text leaves special tokens out.
            generation_mode (`str`, *optional*): `"image"` decodes the last image of each row, `"text"` (default) all
                text of it, `"interleaved"` makes each row a list of its texts and images in their order. What was
                generated to fill a hole stands in the hole's place.

        Raises:
            ValueError: if the mode is unknown, or a row does not end with a whole image in image mode.
        """
        if generation_mode not in (None, *GENERATION_MODES):
            raise ValueError(f"expected generation_mode among {GENERATION_MODES}, got {generation_mode!r}")
        ids = torch.as_tensor(generated_outputs)
        ids = ids[None] if ids.ndim == 1 else ids
        decode = partial(self.tokenizer.decode, skip_special_tokens=skip_special_tokens, **kwargs)
        if generation_mode == "image":
            images = torch.stack([fill_image(row, self.vocabulary) for row in ids])
            return self.decode_images(self.vocabulary.ids_to_codes(images))
        if generation_mode == "interleaved":
            rows = [split_images(row.tolist(), self.vocabulary) for row in ids]
            rows = [[decode(part) if is_text else self._drawn(part) for is_text, part in row] for row in rows]
            return [[part for part in row if part] for row in rows]
        rows = [fill_text(row[~self.vocabulary.is_image(row)].tolist(), self.vocabulary) for row in ids]
        return [decode(row) for row in rows]

    def to(self, device: str | torch.device) -> "CM3LeonProcessor":
        """Moves the VQGAN."""
        self._needed_vqgan().to(device)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves the tokenizer, the image processor and, in a folder of its own, the VQGAN."""
        if self.vqgan is not None:
            self.vqgan.save_pretrained(os.path.join(save_directory, VQGAN_FOLDER))
        files = super().save_pretrained(save_directory)
        if push_to_hub:  # not by the parent, which leaves out what lay in the folder before its own files
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, device: str | None = None, **kwargs):
        """Loads the processor; its VQGAN goes to `device`, by default the accelerator when there is one."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        hub = {
            key: kwargs[key] for key in ("cache_dir", "force_download", "local_files_only", "token") if key in kwargs
        }
        place = {"pretrained_model_name_or_path": pretrained_model_name_or_path, "subfolder": VQGAN_FOLDER}
        if (local := Path(pretrained_model_name_or_path, VQGAN_FOLDER)).is_dir():
            place = {"pretrained_model_name_or_path": local}  # beside adapters, transformers 5.18 expects more of them
        vqgan = CM3LeonVQGAN.from_pretrained(
            **place,
            revision=kwargs.get("revision", "main"),
            dtype=torch.float32,  # small, and codes near a border must not depend on the device
            **hub,
        )
        processor.vqgan = processor._fitting(vqgan)
        return processor.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def to_dict(self) -> dict:
        vqgan, self.vqgan = self.vqgan, None  # it has a folder of its own
        try:
            return {key: value for key, value in super().to_dict().items() if key != "vqgan"}
        finally:
            self.vqgan = vqgan

    def _drawn(self, ids: list[int]) -> Image.Image:
        return self.decode_images(self.vocabulary.ids_to_codes(torch.tensor([ids])))[0]

    def _batch(
        self, texts, image_ids: list[list[int]], padding=True, return_tensors="pt", add_special_tokens=True
    ) -> BatchFeature:
        """Texts whose `<image>` are replaced by the ids of the images, one after the other."""
        vocab = self.vocabulary
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        places = sum(row.count(vocab.image_id) for row in rows)
        if places != len(image_ids):
            raise ValueError(
                f"expected an image for each {IMAGE} in the text, got {len(image_ids)} for {places}; match them"
            )
        images = iter(image_ids)
        rows = [[x for i in row for x in (next(images) if i == vocab.image_id else (i,))] for row in rows]
        if add_special_tokens:
            rows = [row if row[:1] == [vocab.eos_id] else [vocab.eos_id, *row] for row in rows]
        return BatchFeature(self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors))

    def _codes(self, images, image_codes) -> torch.LongTensor | None:
        """The images' codes `(images, image_length)`, made or given."""
        if images is not None:
            return self.encode_images(images)
        if image_codes is None:
            return None
        codes, length = torch.as_tensor(image_codes), self.vocabulary.image_length
        if codes.ndim != 2 or codes.shape[1] != length:
            raise ValueError(
                f"expected codes of shape (images, {length}), got {tuple(codes.shape)}; use this VQGAN's grid"
            )
        return codes

    def _needed_vqgan(self) -> CM3LeonVQGAN:
        if self.vqgan is None:
            raise ValueError("expected a processor with a VQGAN, got one without; load it with from_pretrained")
        return self.vqgan

    def _fitting(self, vqgan: CM3LeonVQGAN) -> CM3LeonVQGAN:
        got = (vqgan.config.num_embeddings, vqgan.config.grid_size)
        if got != (self.image_vocab_size, self.image_grid_size):
            raise ValueError(
                f"expected a VQGAN with {self.image_vocab_size} codes and a grid of {self.image_grid_size}, as in the "
                f"vocabulary, got {got[0]} and {got[1]}; use the VQGAN that this model was trained with"
            )
        return vqgan.eval()


def _check_tokenizer(tokenizer, vocabulary: Vocabulary) -> None:
    if len(tokenizer) > vocabulary.text_size:
        raise ValueError(
            f"expected at most {vocabulary.text_size} text ids, got a tokenizer with {len(tokenizer)}; raise "
            "text_vocab_size"
        )
    wrong = [t for i, t in enumerate(vocabulary.special_tokens) if tokenizer.convert_tokens_to_ids(t) != i]
    if wrong:
        raise ValueError(
            f"expected the special tokens as ids 0 to {len(vocabulary.special_tokens) - 1}, got {wrong[0]!r} as "
            f"{tokenizer.convert_tokens_to_ids(wrong[0])}; train the tokenizer with Vocabulary.special_tokens first"
        )


def _flatten(images) -> Iterable:
    if isinstance(images, (list, tuple)):
        return [leaf for image in images for leaf in _flatten(image)]
    return [images]


__all__ = ["CM3LeonProcessor"]
