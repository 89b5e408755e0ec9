"""generate(): prepares the branches of guidance and the logits processors, then calls the stock loop."""

from functools import partial

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache
from transformers.generation import GenerationMode, TopPLogitsWarper

from .generation_batching import CM3LeonBatchingMixin
from .generation_branches import GUIDANCE_ARGUMENTS, add_branches, branches, choose_guidance, pad_left
from .generation_jacobi import speculative_jacobi
from .logits_processors import (
    ContrastiveLogitsProcessor,
    ImageTopPLogitsWarper,
    KnownTokenLogitsProcessor,
    ModalityLogitsProcessor,
    TextHolesLogitsProcessor,
)
from .vocabulary import GENERATION_MODES, Vocabulary


class CM3LeonGenerationMixin(CM3LeonBatchingMixin):
    """
    Text and image generation on transformers' own loop.

    Guidance adds rows to the batch: the first rows are the user's, the next the same prompts without their text, and
    without their images where that is guided too. All rows go through one forward pass over one cache; a
    [`BranchLogitsProcessor`] folds the scores back to the user's rows before anything else sees them. The order is:
    modality, guidance, stock processors, modality again, known tokens, caller's processors, then temperature, top-k
    and top-p. So contrastive decoding ranks only tokens that may follow, and no stock processor lets another in.
    """

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_mode: str | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        contrastive_alpha: float | None = None,
        contrastive_k: int | None = None,
        known_ids: torch.LongTensor | None = None,
        text_pieces: list[list[list[int]]] | None = None,
        jacobi_window: int | None = None,
        **kwargs,
    ):
        r"""
        Generates an image's tokens, text, or both.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, prompt_length)`, *optional*): Prompts; `input_ids` also works.
            generation_config ([`GenerationConfig`], *optional*): As in transformers. It may hold the mode and the four
                values of guidance as well.
            logits_processor (`LogitsProcessorList`, *optional*): The caller's own processors.
            generation_mode (`str`, *optional*): `"image"`: exactly one image's tokens follow the prompt, which gets
                its `<break>` if it has none; length arguments do not apply. `"text"` (default): no image token
                follows, up to `<eos>`, `max_new_tokens` or the last position. `"interleaved"`: the model moves between
                text and whole images itself.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts to be guided
                away from; a single one serves all. The default is the prompt with its text replaced by `<mask>` in
                image mode, with its images replaced by `<mask>` in text mode, and none in interleaved mode.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 1 for their tokens, 0 for padding.
            guidance_scale (`float`, *optional*): α of classifier-free guidance (equation 2), at least 0; 1 is none.
                The model's own default applies to images only.
            image_guidance_scale (`float`, *optional*): Guides an edit by its image and its text apart (section 4.1);
                `guidance_scale`, then 7.5 by default, is the text's. The paper's value is 1.5.
            contrastive_alpha (`float`, *optional*): α in (0, 1] of CD-K (equation 3), which takes the place of
                guidance. The default is 0.1 where only `contrastive_k` is given.
            contrastive_k (`int`, *optional*): k of CD-K; the default is 8, and 1 is plain contrastive decoding.
            known_ids (`torch.LongTensor` of shape `(batch, new_length)`, *optional*): Image ids to come where they are
                known, -1 where they are free, from [`CM3LeonProcessor.for_infilling`]; image mode then ends with them.
            text_pieces (`list`, *optional*): Text between the holes, from [`CM3LeonProcessor.for_infilling`].
            jacobi_window (`int`, *optional*): Draws images by speculative Jacobi decoding with so many drafts a pass:
                fewer passes, the same distribution.
            kwargs: All of transformers' arguments.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, prompt_length + new_length)`, or a
            `ModelOutput`, as in transformers, whose raw logits, attentions and hidden states hold the rows of guidance
            after the user's.

        Raises:
            ValueError: for an unknown mode, values of guidance that are out of range or exclude each other, guidance
                with nothing to leave out or with anything but greedy search and sampling, ids outside the vocabulary,
                embeddings in their place, known ids of another shape, an image size, or a prompt that leaves too few
                positions.
        """
        if sizes := {"height", "width", "image_size"} & kwargs.keys():
            raise ValueError(
                f"expected no {', '.join(sorted(sizes))}: the model draws the one grid it was trained with, "
                f"{self.config.image_grid_size} x {self.config.image_grid_size} tokens; resize the pictures instead"
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "expected ids, got inputs_embeds: which modality may follow and the prompts of guidance are read from "
                "ids; pass input_ids, or call the model itself"
            )
        call = dict(zip(GUIDANCE_ARGUMENTS, (guidance_scale, image_guidance_scale, contrastive_alpha, contrastive_k)))
        passed, own = _guidance_values(generation_config), _guidance_values(self.generation_config)
        limits = [kwargs.get("max_length"), *(c.max_length for c in (generation_config, self.generation_config) if c)]
        generation_config, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        if not any(limits):
            generation_config.max_length = None  # transformers has put its own default of 20 there
        mode = generation_mode or getattr(generation_config, "generation_mode", None) or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"expected generation_mode among {GENERATION_MODES}, got {mode!r}")
        vocab = self.config.vocabulary
        prompts, width = _prompts(inputs, kwargs, vocab)
        negatives = _rows(negative_prompt_ids, negative_prompt_attention_mask, vocab)
        if mode == "image":
            prompts = [open_image(ids, vocab) for ids in prompts]
            negatives = [open_image(ids, vocab) for ids in negatives]
        guidance = choose_guidance(call, passed, own, mode, steered=bool(negatives))
        generation_config.guidance_scale = 1.0  # or the stock loop would run a second forward pass
        if guidance is not None:
            self._check_guidance(guidance, generation_config, mode, kwargs)
        others = branches(guidance, prompts, negatives, mode, vocab) if guidance is not None else []
        width = max(width, *map(len, prompts))  # what callers cut off to see what is new
        tokens = max(len(ids) for branch in (prompts, *others) for ids in branch)
        length = max(width, tokens)
        needed = _checked_known(known_ids, len(prompts), mode, vocab)
        if mode == "interleaved":
            needed = max(tokens_to_whole_image(ids, vocab) for ids in prompts)
        self._set_length(generation_config, mode, width, tokens, needed)
        ids, attention_mask = pad_left(prompts, length, vocab.pad_id)
        modality = ModalityLogitsProcessor(vocab, mode, length + generation_config.max_new_tokens)
        processors = [modality, *_hole_processors(known_ids, text_pieces, length, vocab)]
        if guidance is not None:
            kwargs |= {"guidance": LogitsProcessorList([modality, guidance])} | self._branch_inputs(others, length)
        if mode == "image":
            kwargs["image_logits_only"] = True
        if jacobi_window is not None:
            _check_jacobi(jacobi_window, mode, generation_config, kwargs.get("past_key_values"))
            kwargs["custom_generate"] = partial(
                speculative_jacobi, window=jacobi_window, streamer=kwargs.get("streamer")
            )
        ids, attention_mask = ids.to(self.device), attention_mask.to(self.device)
        if _may_share_prefix(generation_config, kwargs) and length > 1:
            kwargs["past_key_values"] = self._shared_prefix(ids, attention_mask, generation_config, kwargs)
        output = super().generate(
            input_ids=ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([*processors, *(logits_processor or [])]),
            **kwargs,
        )
        return _cut_left(output, length - width)

    def _check_guidance(self, guidance, generation_config: GenerationConfig, mode: str, kwargs: dict) -> None:
        search = generation_config.get_generation_mode(kwargs.get("assistant_model"))
        if search not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation_config.prefill_chunk_size:
            raise ValueError(
                f"expected greedy search or sampling with guidance, got {search.value} with prefill_chunk_size="
                f"{generation_config.prefill_chunk_size}; set guidance_scale=1 or leave these out"
            )
        if isinstance(guidance, ContrastiveLogitsProcessor):
            guidance.check_size(self.config.image_vocab_size if mode == "image" else self.config.vocab_size)

    def _branch_inputs(self, others: list[list[torch.LongTensor]], length: int) -> dict[str, torch.Tensor]:
        """Further branches' prompts as `(batch, branches, length)`, which the stock loop expands with the batch."""
        padded = [pad_left(prompts, length, self.config.vocabulary.pad_id) for prompts in others]
        ids, masks = (torch.stack(columns, dim=1).to(self.device) for columns in zip(*padded))
        return {"guidance_ids": ids, "guidance_attention_mask": masks}

    @torch.no_grad()
    def _shared_prefix(self, ids, attention_mask, generation_config: GenerationConfig, kwargs: dict) -> Cache:
        """The cache of all prompts but their last token, computed once for all sequences of a prompt."""
        if "guidance_ids" in kwargs:
            ids = add_branches(ids, kwargs["guidance_ids"])
            attention_mask = add_branches(attention_mask, kwargs["guidance_attention_mask"])
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        cache = self.model(
            ids[:, :-1], attention_mask=attention_mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
        ).past_key_values
        cache.batch_repeat_interleave(generation_config.num_return_sequences)
        if generation_config.cache_implementation != "static":
            return cache
        generation_config.cache_implementation = None  # the stock loop gets the cache itself
        static = StaticCache(config=self.config, max_cache_len=ids.shape[1] + generation_config.max_new_tokens)
        for index, layer in enumerate(cache.layers):
            static.update(layer.keys, layer.values, index)
        return static

    def _set_length(self, generation_config: GenerationConfig, mode: str, width: int, tokens: int, needed: int) -> None:
        """Images get exactly what they need, text ends at the last position at the latest. `width` counts padding."""
        left = self.config.max_position_embeddings - tokens
        if left < max(needed, 1):
            raise ValueError(
                f"expected a prompt of at most {left + tokens - max(needed, 1)} tokens, which leaves room for the "
                f"{mode} in {left + tokens} positions, got {tokens}; shorten the prompt or retrieve fewer documents"
            )
        if mode == "image":
            generation_config.forced_eos_token_id = None  # an image ends by its length
            wanted = needed
        else:
            wanted = _text_length(generation_config, width, left)
        if wanted < needed:
            raise ValueError(
                f"expected room for the {needed} image tokens that the prompt asks for, got max_new_tokens={wanted}; "
                "raise it"
            )
        generation_config.max_new_tokens, generation_config.max_length = wanted, None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        guidance_ids: torch.LongTensor | None = None,
        guidance_attention_mask: torch.Tensor | None = None,
        guidance: LogitsProcessorList | None = None,
        **kwargs,
    ) -> dict:
        """Adds the branches' rows to the user's: `(batch, length)` becomes `((1 + branches) * batch, length)`."""
        if guidance_ids is not None:
            if attention_mask is None:  # the stock loop drops a mask that hides nothing of the user's rows
                attention_mask = torch.ones_like(input_ids)
            input_ids = add_branches(input_ids, guidance_ids)
            attention_mask = add_branches(attention_mask, guidance_attention_mask)
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _get_logits_processor(self, *args, model_kwargs=None, **kwargs) -> LogitsProcessorList:
        if model_kwargs is None:
            return self._batching_processors(*args, **kwargs)
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        images = self.config.vocabulary.image_ids
        quick = [ImageTopPLogitsWarper(p, images) if type(p) is TopPLogitsWarper else p for p in processors]
        return LogitsProcessorList([*(model_kwargs.get("guidance") or []), *quick])


def _hole_processors(known_ids, text_pieces, length: int, vocabulary: Vocabulary) -> list:
    """What keeps known tokens in their places while holes are filled; `length` is the prompts'."""
    images = [] if known_ids is None else [KnownTokenLogitsProcessor(known_ids, length)]
    texts = [] if text_pieces is None else [TextHolesLogitsProcessor(vocabulary, text_pieces, length)]
    return images + texts


def _may_share_prefix(config: GenerationConfig, kwargs: dict) -> bool:
    """Whether several sequences are sampled from a prompt, with a plain cache, and nobody looks at the prompt."""
    watched = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    return (
        (config.num_return_sequences or 1) > 1
        and config.get_generation_mode(kwargs.get("assistant_model")) == GenerationMode.SAMPLE
        and config.use_cache is not False
        and config.cache_implementation in (None, "dynamic", "static")
        and kwargs.get("past_key_values") is None
        and not config.prefill_chunk_size
        and not watched
    )


def _check_jacobi(window: int, mode: str, config: GenerationConfig, cache: Cache | None) -> None:
    search = config.get_generation_mode()
    fits = search in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and config.use_cache is not False
    dynamic = config.cache_implementation in (None, "dynamic") and isinstance(cache, DynamicCache | None)
    if mode != "image" or window < 1 or not fits or not dynamic:
        raise ValueError(
            f"expected jacobi_window >= 1 for images by sampling or greedy search with the dynamic cache, got {window} "
            f"in {mode!r} mode by {search.value} with use_cache={config.use_cache} and "
            f"cache_implementation={config.cache_implementation}, past_key_values {type(cache).__name__}; leave it out"
        )


def _guidance_values(config: GenerationConfig | None) -> dict:
    return {name: getattr(config, name, None) for name in GUIDANCE_ARGUMENTS}


def _checked_known(known_ids: torch.LongTensor | None, count: int, mode: str, vocabulary: Vocabulary) -> int:
    """How many image tokens follow: what known ids say, else one grid in image mode."""
    if known_ids is None:
        return vocabulary.image_length if mode == "image" else 0
    fits = known_ids.ndim == 2 and known_ids.shape[0] == count and 0 < known_ids.shape[1] <= vocabulary.image_length
    if mode != "image" or not fits or not ((known_ids == -1) | vocabulary.is_image(known_ids)).all():
        raise ValueError(
            f"expected known_ids in image mode, image ids and -1 of shape ({count}, up to {vocabulary.image_length}), "
            f"got {tuple(known_ids.shape)} in {mode!r} mode; make them with processor.for_infilling"
        )
    return known_ids.shape[1]


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


def open_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> torch.LongTensor:
    """`<eos> text` becomes `<eos> text <break>`, where an image begins; an open one, `<break>` or `<infill>`, stays."""
    opened = ids[-1] in (vocabulary.break_id, vocabulary.infill_id)
    return ids if opened else torch.cat([ids, ids.new_tensor([vocabulary.break_id])])


def tokens_to_whole_image(ids: torch.LongTensor, vocabulary: Vocabulary) -> int:
    """How many tokens an interleaved prompt `(length,)` still needs for the image that it has opened; 0 without one."""
    is_image = vocabulary.is_image(ids)
    run = int(is_image.flip(0).long().cumprod(0).sum())
    opens = ids[-1] == vocabulary.break_id and not (len(ids) > 1 and is_image[-2])
    return vocabulary.image_length if opens else -run % vocabulary.image_length


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


def _cut_left(output, columns: int):
    """Drops the padding that longer prompts of guidance have put in front of the user's."""
    if isinstance(output, torch.Tensor):
        return output[:, columns:]
    output.sequences = output.sequences[:, columns:]
    return output


__all__ = ["CM3LeonGenerationMixin"]
