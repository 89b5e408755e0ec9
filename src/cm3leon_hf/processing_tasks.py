"""The prompts of the tasks: drawing, describing, editing, drawing from a control image or boxes, filling holes."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature

from .images import read_image
from .processing_infilling import image_holes, masked_tokens, text_holes
from .processing_prompts import (
    CONTROLS,
    EDITING,
    GROUNDED,
    IMAGE_TO_IMAGE,
    IMAGE_TO_TEXT,
    behind_retrieved,
    object_at,
)
from .vocabulary import BREAK, IMAGE, INFILL, MASK


class CM3LeonTasksMixin:
    """What [`CM3LeonProcessor`] puts in front of the model for each task; `generate` continues it."""

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
        room = (max_length or self.tokenizer.model_max_length) - self.vocabulary.image_length
        return self.with_retrieved(self(text=texts), retrieved, room)

    def with_retrieved(
        self,
        inputs: BatchFeature,
        retrieved: list[list[dict]],
        max_length: int,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Prompts of any task behind the documents that were retrieved for them (sections 2.1 and 2.2).

        Args:
            inputs ([`BatchFeature`]): Prompts, as this processor makes them.
            retrieved (`list[list[dict]]`): Documents for each prompt, the best first, each as `document_ids` takes it.
            max_length (`int`): Positions that each prompt may take, without those of its answer. Documents that do not
                fit are dropped whole, the worst first.
            padding, return_tensors: As `__call__` takes them.

        Raises:
            ValueError: if there are not as many lists of documents as prompts, or as `document_ids`.
        """
        if len(retrieved) != len(inputs["input_ids"]):
            raise ValueError(
                f"expected a list of documents for each of {len(inputs['input_ids'])} prompts, got {len(retrieved)}; "
                "match them"
            )
        rows = [
            behind_retrieved(
                [self.document_ids(one) for one in documents],
                [int(x) for x, kept in zip(ids, mask) if kept],
                max_length,
            )
            for documents, ids, mask in zip(retrieved, inputs["input_ids"], inputs["attention_mask"])
        ]
        return BatchFeature(self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors))

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

    def for_boxes(self, text: str, objects: Sequence[tuple[str, Sequence[float]]]) -> BatchFeature:
        """
        A prompt whose continuation is a picture with objects in their boxes (Table 5, object-grounded).

        Generate with `generation_mode="image"` and `guidance_scale=3.0`.

        Args:
            text (`str`): What to draw, such as "apple and car, noto style".
            objects (sequence of `(str, box)`): Names with their boxes `x0, y0, x1, y1`, from the upper left corner, in
                [0, 1].

        Raises:
            ValueError: if the text or a name is empty, there are no objects, or a box is empty or reaches out of the
                picture.
        """
        if not text.strip() or not objects or not all(name.strip() for name, _ in objects):
            raise ValueError(f"expected a text and named objects, got {text!r} and {objects}; say what is where")
        for name, box in objects:
            sides = np.asarray(box, np.float64)
            inside = sides.shape == (4,) and sides.min() >= 0 and sides.max() <= 1
            if not inside or (sides[:2] >= sides[2:]).any():
                raise ValueError(f"expected a box x0, y0, x1, y1 in [0, 1] for {name}, got {list(box)}; correct it")
        places = ", ".join(object_at(name, box, self.vocabulary) for name, box in objects)
        return self(text=GROUNDED.format(text=text, objects=places))

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

    def _from_images(self, template: str, images, text: str, **words: str) -> BatchFeature:
        """One prompt for each image, all with the same text."""
        if not text.strip():
            raise ValueError("expected a text that is not empty, got an empty one; say what you want to see")
        codes = self.encode_images(images)
        return self(text=[template.format(text=text, **words)] * len(codes), image_codes=codes)


__all__ = ["CM3LeonTasksMixin"]
