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
from .processing_infilling import fill_image, fill_text, image_holes, masked_tokens, split_images, text_holes
from .processing_prompts import CHAT_TEMPLATE, CONTROLS, EDITING, IMAGE_TO_IMAGE, IMAGE_TO_TEXT, behind_retrieved
from .vocabulary import BREAK, GENERATION_MODES, IMAGE, INFILL, MASK, Vocabulary

VQGAN_FOLDER = "vqgan"


class CM3LeonProcessor(ProcessorMixin):
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
        return self._batch(texts, image_ids, padding, return_tensors, add_special_tokens)

    def for_text_to_image(
        self, prompts: str | list[str], retrieved: list[list[dict]] | None = None, max_length: int | None = None
    ) -> BatchFeature:
        """
        Prompts whose continuation is an image: `<eos> text <break>` (section 2.2), behind retrieved documents if any.

        Args:
            prompts (`str` or `list[str]`): What to draw.
            retrieved (`list[list[dict]]`, *optional*): Documents for each prompt, the best first, as
                [`~cm3leon_hf.retrieval.augmenter.RetrievalAugmenter.for_prompts`] gives them: each with `text`, or a
                picture as `codes` or `image`, or both.
            max_length (`int`, *optional*): Positions that the prompt and its image may take; by default the
                tokenizer's `model_max_length`. Documents that do not fit are dropped whole, the worst first.

        Raises:
            ValueError: if a prompt is empty, or there are not as many lists of documents as prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise ValueError("expected prompts that are not empty, got an empty one; say what you want to see")
        texts = [f"{prompt}{BREAK}" for prompt in prompts]
        if retrieved is None:
            return self(text=texts)
        if len(retrieved) != len(prompts):
            raise ValueError(
                f"expected a list of documents for each of {len(prompts)} prompts, got {len(retrieved)}; match them"
            )
        room = (max_length or self.tokenizer.model_max_length) - self.vocabulary.image_length
        rows = [
            behind_retrieved(
                [self.document_ids(one) for one in documents], self(text=text)["input_ids"][0].tolist(), room
            )
            for documents, text in zip(retrieved, texts)
        ]
        return BatchFeature(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))

    def document_ids(self, document: dict) -> list[int]:
        """
        A document's ids, `<eos> text <break> image`, without what it lacks.

        Args:
            document (`dict`): With `text`, or a picture as `codes` or `image`, or both.

        Raises:
            ValueError: if it has neither, or as `__call__`.
        """
        text, codes, image = (document.get(name) for name in ("text", "codes", "image"))
        if text is None and codes is None and image is None:
            raise ValueError("expected a document with a text or a picture, got neither; leave it out")
        shown = codes is not None or image is not None
        codes = None if codes is None else torch.as_tensor(codes, dtype=torch.long)[None]
        codes = self._codes(image if codes is None else None, codes)
        image_ids = [] if codes is None else self.vocabulary.codes_to_ids(codes).tolist()
        return self._batch([f"{text or ''}{BREAK}{IMAGE}" if shown else text], image_ids)["input_ids"][0].tolist()

    def for_image_to_text(self, images=None, text: str | None = None, image_codes=None) -> BatchFeature:
        """
        Prompts whose continuation describes an image: `<eos> text <mask> <break> image <infill>` (section 2.2).

        Args:
            images (picture or list): What to describe.
            text (`str`, *optional*): An instruction, such as "Describe the given picture."
            image_codes (`torch.LongTensor` of shape `(images, image_length)`, *optional*): Codes in place of images.

        Raises:
            ValueError: as `__call__`.
        """
        codes = self._codes(images, image_codes)
        if codes is None:
            raise ValueError("expected images or their codes, got neither; pass what to describe")
        return self(text=[f"{text or ''}{IMAGE_TO_TEXT}"] * len(codes), image_codes=codes)

    def for_editing(self, images, instruction: str) -> BatchFeature:
        """
        Prompts whose continuation is the picture changed as the instruction says (Table 5, InstructPix2Pix).

        Generate with `generation_mode="image"` and `image_guidance_scale=1.5, guidance_scale=7.5` (section 4.1).

        Args:
            images (picture or list): What to edit.
            instruction (`str`): Such as "make it blue".

        Raises:
            ValueError: if the instruction is empty, or a picture cannot be read.
        """
        return self._from_images(EDITING, images, instruction)

    def for_image_to_image(self, control_images, control: str, text: str) -> BatchFeature:
        """
        Prompts whose continuation is a picture with the structure of a control image (Table 5).

        Generate with `generation_mode="image"` and one `guidance_scale=3.0` (section 4.1).

        Args:
            control_images (picture or list): Edges, depth and so on, as pictures.
            control (`str`): What they show: `"canny"`, `"segmentation"`, `"hed"`, `"pose"`, `"depth"`, `"normal"` or
                `"scribble"`.
            text (`str`): What to draw.

        Raises:
            ValueError: if the control is unknown, the text is empty, or a picture cannot be read.
        """
        if control not in CONTROLS:
            raise ValueError(f"expected a control among {sorted(CONTROLS)}, got {control!r}")
        return self._from_images(IMAGE_TO_IMAGE, control_images, text, control=CONTROLS[control])

    def for_infilling(self, image=None, mask=None, text: str | None = None) -> BatchFeature:
        """
        Prompts whose continuation fills a hole of a picture, or holes of a text (section 2.2).

        For a picture, generate with `generation_mode="image"`: the span from the first to the last token under the mask
        is written anew, its tokens outside the mask are forced, and everything else stays as it is. For a text, with
        `generation_mode="text"`. `post_process_multimodal_output` puts what was written back into its place.

        Args:
            image (picture, *optional*): The picture to fill, or the one that the text describes.
            mask (picture or array of shape `(height, width)`, *optional*): White where the picture is to be filled; of
                the picture's size.
            text (`str`, *optional*): With a mask, what the picture shows; without, a text with `<mask>` for each hole.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask`, and `known_ids` or `text_pieces` for `generate`.

        Raises:
            ValueError: for a mask of another size or over nothing, a mask without a picture, holes in both, or none.
        """
        if mask is None:
            text, pieces = text_holes(text or "", self.tokenizer)
            shown = "" if image is None else f"{BREAK}{IMAGE}"
            batch = self(text=f"{text}{shown}{INFILL}", images=image)
            return BatchFeature(dict(batch) | {"text_pieces": [pieces]})
        if image is None or MASK in (text or ""):
            raise ValueError(f"expected a picture for the mask and a text without {MASK}, got no picture or both holes")
        picture = read_image(image)
        masked = masked_tokens(mask, picture, self.image_processor, self.image_grid_size)
        left, known = image_holes(self.encode_images(picture), masked[None], self.vocabulary)
        batch = self._batch([f"{text or MASK}{BREAK}{IMAGE}"], left)
        return BatchFeature(dict(batch) | {"known_ids": known})

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
            place = {"pretrained_model_name_or_path": local}  # beside adapters, transformers 5.17 expects more of them
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

    def _from_images(self, template: str, images, text: str, **words: str) -> BatchFeature:
        """One prompt for each image, all with the same text."""
        if not text.strip():
            raise ValueError("expected a text that is not empty, got an empty one; say what you want to see")
        codes = self.encode_images(images)
        return self(text=[template.format(text=text, **words)] * len(codes), image_codes=codes)

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
