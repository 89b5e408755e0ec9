"""generate(): prepares the branches of guidance and the logits processors, then calls the stock loop."""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from .logits_processors import BatchedGuidanceLogitsProcessor, ModalityLogitsProcessor
from .vocabulary import Vocabulary

GENERATION_MODES = ("text", "image")


class CM3LeonGenerationMixin(GenerationMixin):
    """
    Text and image generation on transformers' own loop.

    Guidance adds rows to the batch: the first rows are the user's, the next the same prompts without their text. All
    rows go through one forward pass over one cache; [`BatchedGuidanceLogitsProcessor`] folds the logits back to the
    user's rows before anything else sees them. The order is: guidance, stock processors, modality, caller's
    processors, then temperature, top-k and top-p.
    """

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_mode: str | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        r"""
        Generates an image's tokens, or text.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, prompt_length)`, *optional*): Prompts; `input_ids` also works.
            generation_config ([`GenerationConfig`], *optional*): As in transformers.
            logits_processor (`LogitsProcessorList`, *optional*): The caller's own processors.
            generation_mode (`str`, *optional*): `"image"`: exactly one image's tokens follow the prompt, which gets
                its `<break>` if it has none; length arguments do not apply. `"text"` (default): no image token
                follows, up to `<eos>` or `max_new_tokens`.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts to be guided
                away from. In image mode the default is the prompt with its text replaced by `<mask>`.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 1 for their tokens, 0 for padding.
            kwargs: All of transformers' arguments. `guidance_scale` (α of equation 2) applies in image mode, and
                in text mode when `negative_prompt_ids` are given.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, prompt_length + new_length)`, or a
            `ModelOutput`, as in transformers.

        Raises:
            ValueError: for an unknown mode, a negative `guidance_scale`, guidance with beams, ids outside the
                vocabulary, or a prompt that leaves too few positions.
        """
        generation_config, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        mode = generation_mode or getattr(generation_config, "generation_mode", None) or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"expected generation_mode among {GENERATION_MODES}, got {mode!r}")
        prompts = _prompts(inputs, kwargs, self.config.vocabulary)
        negatives = _rows(negative_prompt_ids, negative_prompt_attention_mask, self.config.vocabulary)
        if mode == "image":
            prompts = [open_image(ids, self.config.vocabulary) for ids in prompts]
            negatives = [open_image(ids, self.config.vocabulary) for ids in negatives]
        if needs_guidance(generation_config, mode, negatives):
            negatives = negatives or [without_text(ids, self.config.vocabulary) for ids in prompts]
        else:
            negatives = []
        length = max(map(len, prompts + negatives))
        self._set_length(generation_config, mode, length)
        ids, attention_mask = _pad_left(prompts, length, self.config.vocabulary.pad_id)
        if negatives:
            negative_ids, negative_mask = _pad_left(negatives, length, self.config.vocabulary.pad_id)
            # (batch, branches, length), so that the stock loop expands them with the batch
            kwargs |= {"guidance_ids": negative_ids[:, None].to(self.device)}
            kwargs |= {"guidance_attention_mask": negative_mask[:, None].to(self.device)}
        modality = ModalityLogitsProcessor(self.config.vocabulary, mode)
        return super().generate(
            input_ids=ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([modality, *(logits_processor or [])]),
            **kwargs,
        )

    def _set_length(self, generation_config: GenerationConfig, mode: str, prompt_length: int) -> None:
        """An image is one whole grid; text ends at the last position at the latest."""
        positions = self.config.max_position_embeddings
        wanted = self.config.vocabulary.image_length if mode == "image" else 1
        if prompt_length + wanted > positions:
            raise ValueError(
                f"expected a prompt of at most {positions - wanted} tokens, which leaves room for the {mode} in "
                f"{positions} positions, got {prompt_length}; shorten the prompt or retrieve fewer documents"
            )
        if mode == "image":
            generation_config.max_new_tokens = wanted
        elif generation_config.max_new_tokens is None and generation_config.max_length is not None:
            generation_config.max_length = min(generation_config.max_length, positions)
        else:
            left = positions - prompt_length
            generation_config.max_new_tokens = min(generation_config.max_new_tokens or left, left)
        if generation_config.max_new_tokens is not None:
            generation_config.max_length = None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        guidance_ids: torch.LongTensor | None = None,
        guidance_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Adds the branches' rows to the user's: `(batch, length)` becomes `((1 + branches) * batch, length)`."""
        if guidance_ids is not None:
            input_ids = _add_branches(input_ids, guidance_ids)
            attention_mask = _add_branches(attention_mask, guidance_attention_mask)
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if (branches := model_kwargs.get("guidance_ids")) is not None:
            batch_size *= 1 + branches.shape[1]
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs) -> LogitsProcessorList:
        scale = generation_config.guidance_scale
        generation_config = copy.copy(generation_config)
        generation_config.guidance_scale = None  # the stock processor would run a second forward pass
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        if model_kwargs is not None and "guidance_ids" in model_kwargs:
            processors.insert(0, BatchedGuidanceLogitsProcessor(scale))
        return processors


def needs_guidance(generation_config: GenerationConfig, mode: str, negatives: list) -> bool:
    """Whether there is anything to guide: a scale other than 1, and in text mode something to guide away from."""
    scale = generation_config.guidance_scale
    if scale is None or scale == 1 or (mode == "text" and not negatives):
        return False
    BatchedGuidanceLogitsProcessor(scale)  # raises for a negative scale before any work
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"expected num_beams=1 with guidance, got {generation_config.num_beams}; sample instead")
    return True


def open_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """`<eos> text` becomes `<eos> text <break>`, where an image begins; a prompt that has its `<break>` stays."""
    return ids if ids[-1] == vocabulary.break_id else torch.cat([ids, ids.new_tensor([vocabulary.break_id])])


def without_text(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """The unconditional prompt (section 3.3): the last document's text replaced by `<mask>`; `ids` is `(length,)`."""
    starts = (ids == vocabulary.eos_id).nonzero().flatten()
    start = int(starts[-1]) + 1 if len(starts) else 0
    return torch.cat([ids[:start], ids.new_tensor([vocabulary.mask_id, vocabulary.break_id])])


def _prompts(inputs, kwargs: dict, vocabulary: Vocabulary) -> list[torch.LongTensor]:
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    if ids is None or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"expected input_ids of shape (batch, length) with at least one token, got "
            f"{None if ids is None else tuple(ids.shape)}; make prompts with the processor"
        )
    return _rows(ids, kwargs.pop("attention_mask", None), vocabulary)


def _rows(ids, attention_mask, vocabulary: Vocabulary) -> list[torch.LongTensor]:
    """`(batch, length)` ids to one tensor a row, without padding."""
    if ids is None:
        return []
    if not (ids.min() >= 0 and ids.max() < vocabulary.size):
        raise ValueError(
            f"expected ids in [0, {vocabulary.size}), got {ids.min().item()} to {ids.max().item()}; "
            "use the processor that was saved with this model"
        )
    mask = ids != vocabulary.pad_id if attention_mask is None else attention_mask.to(ids.device).bool()
    rows = [row[kept] for row, kept in zip(ids, mask)]
    if not all(len(row) for row in rows):
        raise ValueError("expected at least one token in each prompt, got a row of padding; drop empty prompts")
    return rows


def _pad_left(rows: list[torch.LongTensor], length: int, pad_id: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    ids = rows[0].new_full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask


def _add_branches(own: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Own rows `(batch, length)`, then each branch's rows: its prompt, continued with the tokens generated so far."""
    generated = own[:, branches.shape[2] :]
    return torch.cat([own, *(torch.cat([prompt, generated], dim=1) for prompt in branches.unbind(1))])


__all__ = ["CM3LeonGenerationMixin"]
