"""generate(): prepares the branches of guidance and the logits processors, then calls the stock loop."""

from functools import partial

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.utils.deprecation import deprecate_kwarg

from .generation_batching import CM3LeonBatchingMixin
from .generation_branches import (
    GUIDANCE_ARGUMENTS,
    add_branches,
    branches,
    choose_guidance,
    guidance_values,
    pad_left,
)
from .generation_cache import make_room
from .generation_images import draw_codes, ids_of_codes, may_draw_codes
from .generation_jacobi import check_jacobi, speculative_jacobi
from .generation_prefix import may_share_prefix, shared_prefix
from .generation_prompts import needed_image_tokens, open_image, read_prompts, set_length, without_padding
from .logits_processors import (
    ContrastiveLogitsProcessor,
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

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
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
                away from; a single one serves all. The default is the prompt with its text replaced by `<mask>` and
                without retrieved documents in image mode, with its images replaced by `<mask>` in text mode, and none
                in interleaved mode.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 1 for their tokens, 0 for padding.
            guidance_scale (`float`, *optional*): α of classifier-free guidance (equation 2), at least 0; 1 is none.
                The model's own default is for images, and for text only with negative prompts.
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
        self._refuse_arguments(kwargs)
        vocab = self.config.vocabulary
        call = dict(zip(GUIDANCE_ARGUMENTS, (guidance_scale, image_guidance_scale, contrastive_alpha, contrastive_k)))
        passed, own = guidance_values(generation_config), guidance_values(self.generation_config)
        generation_config, kwargs = self._prepare_configuration(generation_config, kwargs)
        mode = generation_mode or getattr(generation_config, "generation_mode", None) or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"expected generation_mode among {GENERATION_MODES}, got {mode!r}")
        prompts, width = read_prompts(inputs, kwargs, vocab)
        negatives = without_padding(negative_prompt_ids, negative_prompt_attention_mask, vocab)
        if mode == "image":
            prompts, negatives = ([open_image(ids, vocab) for ids in rows] for rows in (prompts, negatives))

        guidance = choose_guidance(call, passed, own, mode, steered=bool(negatives))
        others = []  # the prompts of further branches
        if guidance is not None:
            self._check_guidance(guidance, generation_config, mode, kwargs)
            others = branches(guidance, prompts, negatives, mode, vocab)

        width = max(width, *map(len, prompts))  # what callers cut off to see what is new
        tokens = max(len(ids) for branch in (prompts, *others) for ids in branch)
        length = max(width, tokens)
        needed = needed_image_tokens(prompts, known_ids, mode, vocab)
        set_length(generation_config, mode, width, tokens, needed, self.config.max_position_embeddings)
        ids, attention_mask = (rows.to(self.device) for rows in pad_left(prompts, length, vocab.pad_id))

        modality = ModalityLogitsProcessor(vocab, mode, length + generation_config.max_new_tokens)
        processors = [modality, *_hole_processors(known_ids, text_pieces, length, vocab), *(logits_processor or [])]
        if guidance is not None:
            kwargs |= {"guidance": LogitsProcessorList([modality, guidance])} | self._branch_inputs(others, length)
        if mode == "image":
            kwargs["draws_image"] = True
        if jacobi_window is not None:
            check_jacobi(jacobi_window, mode, generation_config, kwargs.get("cache"))
            kwargs["custom_generate"] = partial(
                speculative_jacobi, window=jacobi_window, streamer=kwargs.get("streamer")
            )
        if may_share_prefix(generation_config, kwargs) and length > 1:
            kwargs["cache"] = shared_prefix(self, ids, attention_mask, generation_config, kwargs)
        output = super().generate(
            input_ids=ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList(processors),
            **kwargs,
        )
        return _cut_left(output, length - width)

    def _refuse_arguments(self, kwargs: dict) -> None:
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

    def _prepare_configuration(self, passed: GenerationConfig | None, kwargs: dict) -> tuple[GenerationConfig, dict]:
        """The call's configuration on top of the model's defaults, and the arguments that it does not hold."""
        limits = [kwargs.get("max_length"), *(c.max_length for c in (passed, self.generation_config) if c)]
        config, kwargs = self._prepare_generation_config(passed, **kwargs)
        if not any(limits):
            config.max_length = None  # transformers has put its own default of 20 there
        config.guidance_scale = 1.0  # or the stock loop would run a second forward pass
        return config, kwargs

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

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        guidance_ids: torch.LongTensor | None = None,
        guidance_attention_mask: torch.Tensor | None = None,
        guidance: LogitsProcessorList | None = None,
        draws_image: bool = False,
        codes_from: int | None = None,
        **kwargs,
    ) -> dict:
        """Adds the branches' rows to the user's: `(batch, length)` becomes `((1 + branches) * batch, length)`."""
        if codes_from is not None:
            input_ids = ids_of_codes(input_ids, codes_from, self.config.vocabulary)
        if guidance_ids is not None:
            if attention_mask is None:  # the stock loop drops a mask that hides nothing of the user's rows
                attention_mask = torch.ones_like(input_ids)
            input_ids = add_branches(input_ids, guidance_ids)
            attention_mask = add_branches(attention_mask, guidance_attention_mask)
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        passed = model_kwargs.get("cache")
        if getattr(passed, "is_shared_prefix", False):
            generation_config.cache_implementation = None  # the stock loop refuses both
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if passed is None and "cache" in model_kwargs:
            model_kwargs["cache"] = make_room(model_kwargs["cache"], generation_config.max_length)

    def _get_logits_processor(self, *args, model_kwargs=None, **kwargs) -> LogitsProcessorList:
        if model_kwargs is None:
            return self._batching_processors(*args, **kwargs)
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        return LogitsProcessorList([*(model_kwargs.get("guidance") or []), *processors])

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, draws_image=False, **model_kwargs
    ):
        if not (draws_image and may_draw_codes(stopping_criteria, generation_config)):
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        return draw_codes(
            super()._sample, self.config.vocabulary, input_ids, logits_processor, stopping_criteria, generation_config,
            **model_kwargs,
        )  # fmt: skip


def _hole_processors(known_ids, text_pieces, length: int, vocabulary: Vocabulary) -> list:
    """What keeps known tokens in their places while holes are filled; `length` is the prompts'."""
    images = [] if known_ids is None else [KnownTokenLogitsProcessor(known_ids, length)]
    texts = [] if text_pieces is None else [TextHolesLogitsProcessor(vocabulary, text_pieces, length)]
    return images + texts


def _cut_left(output, columns: int):
    """Drops the padding that longer prompts of guidance have put in front of the user's."""
    if isinstance(output, torch.Tensor):
        return output[:, columns:]
    output.sequences = output.sequences[:, columns:]
    return output


__all__ = ["CM3LeonGenerationMixin"]
