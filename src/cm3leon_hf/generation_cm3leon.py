"""generate(): prepares the branches of guidance and the logits processors, then calls the stock loop."""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode

from .logits_processors import BatchedGuidanceLogitsProcessor, ModalityLogitsProcessor
from .vocabulary import GENERATION_MODES, Vocabulary


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
                follows, up to `<eos>`, `max_new_tokens` or the last position.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts to be guided
                away from; a single one serves all. In image mode the default is the prompt with its text replaced by
                `<mask>`.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 1 for their tokens, 0 for padding.
            kwargs: All of transformers' arguments. `guidance_scale` (α of equation 2) applies in image mode, and
                in text mode when `negative_prompt_ids` are given.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, prompt_length + new_length)`, or a
            `ModelOutput`, as in transformers, whose raw logits, attentions and hidden states hold the rows of guidance
            after the user's.

        Raises:
            ValueError: for an unknown mode, a `guidance_scale` below 0 or not finite, guidance with anything but greedy
                search and sampling, ids outside the vocabulary, or a prompt that leaves too few positions.
        """
        sources = (generation_config, self.generation_config)
        limits = [kwargs.get("max_length"), *(source.max_length for source in sources if source is not None)]
        generation_config, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        if not any(limits):
            generation_config.max_length = None  # transformers has put its own default of 20 there
        mode = generation_mode or getattr(generation_config, "generation_mode", None) or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"expected generation_mode among {GENERATION_MODES}, got {mode!r}")
        prompts, width = _prompts(inputs, kwargs, self.config.vocabulary)
        negatives = _rows(negative_prompt_ids, negative_prompt_attention_mask, self.config.vocabulary)
        if mode == "image":
            prompts = [open_image(ids, self.config.vocabulary) for ids in prompts]
            negatives = [open_image(ids, self.config.vocabulary) for ids in negatives]
        guided = needs_guidance(generation_config, mode, negatives, kwargs.get("assistant_model"))
        negatives = _for_each(prompts, negatives, self.config.vocabulary) if guided else []
        width = max(width, *map(len, prompts))  # what callers cut off to see what is new
        length = max(width, *map(len, prompts + negatives))
        self._set_length(generation_config, mode, width, max(map(len, prompts + negatives)))
        ids, attention_mask = _pad_left(prompts, length, self.config.vocabulary.pad_id)
        modality = ModalityLogitsProcessor(self.config.vocabulary, mode)
        output = super().generate(
            input_ids=ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([modality, *(logits_processor or [])]),
            **self._guidance_inputs(negatives, length),
            **kwargs,
        )
        return _cut_left(output, length - width)

    def _guidance_inputs(self, negatives: list[torch.LongTensor], length: int) -> dict[str, torch.Tensor]:
        """The negative prompts as `(batch, branches, length)`, so that the stock loop expands them with the batch."""
        if not negatives:
            return {}
        ids, mask = _pad_left(negatives, length, self.config.vocabulary.pad_id)
        return {
            "guidance_ids": ids[:, None].to(self.device),
            "guidance_attention_mask": mask[:, None].to(self.device),
        }

    def _set_length(self, generation_config: GenerationConfig, mode: str, width: int, tokens: int) -> None:
        """An image is one whole grid; text ends at the last position at the latest. `width` counts padding."""
        positions = self.config.max_position_embeddings
        wanted = self.config.vocabulary.image_length if mode == "image" else 1
        if tokens + wanted > positions:
            raise ValueError(
                f"expected a prompt of at most {positions - wanted} tokens, which leaves room for the {mode} in "
                f"{positions} positions, got {tokens}; shorten the prompt or retrieve fewer documents"
            )
        if mode == "image":
            generation_config.forced_eos_token_id = None  # an image ends by its length
        else:
            wanted = _text_length(generation_config, width, positions - tokens)
        generation_config.max_new_tokens, generation_config.max_length = wanted, None

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
            if attention_mask is None:  # the stock loop drops a mask that hides nothing of the user's rows
                attention_mask = torch.ones_like(input_ids)
            input_ids = _add_branches(input_ids, guidance_ids)
            attention_mask = _add_branches(attention_mask, guidance_attention_mask)
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs) -> LogitsProcessorList:
        scale = generation_config.guidance_scale
        generation_config = copy.copy(generation_config)
        generation_config.guidance_scale = None  # the stock processor would run a second forward pass
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        if model_kwargs is not None and "guidance_ids" in model_kwargs:
            processors.insert(0, BatchedGuidanceLogitsProcessor(scale))
        return processors


def _text_length(generation_config: GenerationConfig, width: int, left: int) -> int:
    """New tokens that the caller wants, at most `left`."""
    wanted = generation_config.max_new_tokens
    if wanted is None and (limit := generation_config.max_length) is not None:
        if limit <= width:
            raise ValueError(
                f"expected max_length to be more than the prompt's {width} tokens, got {limit}; set max_new_tokens"
            )
        wanted = limit - width
    return left if wanted is None else min(wanted, left)


def needs_guidance(generation_config: GenerationConfig, mode: str, negatives: list, assistant_model=None) -> bool:
    """Whether there is anything to guide: a scale other than 1, and in text mode something to guide away from."""
    scale = generation_config.guidance_scale
    if scale is None or scale == 1:
        return False
    BatchedGuidanceLogitsProcessor(scale)  # raises for a scale out of range before any work
    if mode == "text" and not negatives:
        return False
    search = generation_config.get_generation_mode(assistant_model)
    if search not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation_config.prefill_chunk_size:
        raise ValueError(
            f"expected greedy search or sampling with guidance, got {search.value} with prefill_chunk_size="
            f"{generation_config.prefill_chunk_size}; set guidance_scale=1 or leave these out"
        )
    return True


def open_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """`<eos> text` becomes `<eos> text <break>`, where an image begins; a prompt that has its `<break>` stays."""
    return ids if ids[-1] == vocabulary.break_id else torch.cat([ids, ids.new_tensor([vocabulary.break_id])])


def without_text(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """The unconditional prompt (section 3.3): the last document's text replaced by `<mask>`; `ids` is `(length,)`."""
    starts = (ids == vocabulary.eos_id).nonzero().flatten()
    start = int(starts[-1]) + 1 if len(starts) else 0
    return torch.cat([ids[:start], ids.new_tensor([vocabulary.mask_id, vocabulary.break_id])])


def _prompts(inputs, kwargs: dict, vocabulary: Vocabulary) -> tuple[list[torch.LongTensor], int]:
    """The prompts without padding, and the width they had with it."""
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"expected input_ids as a tensor of shape (batch, length) with at least one token, got "
            f"{tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids)}; make prompts with the processor"
        )
    return _rows(ids, kwargs.pop("attention_mask", None), vocabulary), ids.shape[1]


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
    if mask.shape != ids.shape:
        raise ValueError(
            f"expected an attention mask of shape {tuple(ids.shape)}, as the ids, got {tuple(mask.shape)}; "
            "make both with the processor"
        )
    rows = [row[kept] for row, kept in zip(ids, mask)]
    if not all(len(row) for row in rows):
        raise ValueError("expected at least one token in each prompt, got a row of padding; drop empty prompts")
    return rows


def _for_each(prompts: list, negatives: list, vocabulary: Vocabulary) -> list:
    """One negative prompt for each prompt: a single one serves all, and none means the prompts without their text."""
    if not negatives:
        return [without_text(ids, vocabulary) for ids in prompts]
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(
            f"expected one negative prompt, or one for each of the {len(prompts)} prompts, got {len(negatives)}"
        )
    return negatives * len(prompts) if len(negatives) == 1 else negatives


def _pad_left(rows: list[torch.LongTensor], length: int, pad_id: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    ids = rows[0].new_full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask


def _cut_left(output, columns: int):
    """Drops the padding that longer prompts of guidance have put in front of the user's."""
    if isinstance(output, torch.Tensor):
        return output[:, columns:]
    output.sequences = output.sequences[:, columns:]
    return output


def _add_branches(own: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Own rows `(batch, length)`, then each branch's rows: its prompt, continued with the tokens generated so far."""
    generated = own[:, branches.shape[2] :]
    return torch.cat([own, *(torch.cat([prompt, generated], dim=1) for prompt in branches.unbind(1))])


__all__ = ["CM3LeonGenerationMixin"]
