"""Continuous batching: prompts of any number and length share a batch, and each leaves it when it is done."""

import copy

from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from .generation_branches import GUIDANCE_ARGUMENTS, choose_guidance, guidance_of, guidance_values
from .logits_processors import BranchLogitsProcessor, ModalityLogitsProcessor


class CM3LeonBatchingMixin(GenerationMixin):
    """
    Text and unguided images by transformers' continuous batching.

    Guidance is not to be had, because its branches are rows that go in step: the scheduler admits, splits and evicts
    requests one by one, and each row draws its own token. Nor would much be gained: all images have as many tokens, so
    a batch of `generate` ends together. The interleaved mode is not to be had either, as its grammar reads what a row
    holds so far.
    """

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        generation_mode: str | None = None,
        **kwargs,
    ) -> dict:
        """
        Generates for many prompts with continuous batching.

        Args:
            inputs (`list[list[int]]`): Prompts of any lengths, without padding.
            generation_config ([`GenerationConfig`], *optional*): As in transformers.
            generation_mode (`str`, *optional*): `"text"` (default), up to the last position at most, or `"image"`.
            kwargs: As in transformers, such as `continuous_batching_config` and `max_new_tokens`, and
                `guidance_scale=1` for images where the model's own default is to guide them.

        Returns:
            `dict[str, GenerationOutput]`: By request; `generated_tokens` leaves the prompt out.

        Raises:
            ValueError: for another mode, guidance, or a prompt that leaves no room.
        """
        config = copy.deepcopy(generation_config or self.generation_config)
        if generation_mode:
            config.generation_mode = generation_mode
        mode = config.generation_mode = _batching_mode(config)
        call = {name: kwargs.pop(name, None) for name in GUIDANCE_ARGUMENTS}
        passed, own = guidance_values(generation_config), guidance_values(self.generation_config)
        _refuse(choose_guidance(call, passed, own, mode, steered=False))
        for name in GUIDANCE_ARGUMENTS:
            setattr(config, name, None)
        vocab = self.config.vocabulary
        if mode == "image":
            inputs = [ids if ids[-1] in (vocab.break_id, vocab.infill_id) else [*ids, vocab.break_id] for ids in inputs]
        longest = max(map(len, inputs), default=1)
        left = self.config.max_position_embeddings - longest
        needed = vocab.image_length if mode == "image" else 1
        if left < needed:
            raise ValueError(
                f"expected prompts of at most {left + longest - needed} tokens, which leaves room for the {mode} in "
                f"{left + longest} positions, got {longest}; shorten the prompt"
            )
        wanted = kwargs.pop("max_new_tokens", None) or config.max_new_tokens or left
        config.max_new_tokens = needed if mode == "image" else min(wanted, left)
        return super().generate_batch(inputs, config, **kwargs)

    def _batching_processors(self, generation_config: GenerationConfig) -> LogitsProcessorList:
        """The processors of a configuration alone, which is all that continuous batching knows."""
        mode = _batching_mode(generation_config)
        if mode == "image":
            _refuse(guidance_of(**guidance_values(generation_config)))
        plain = copy.deepcopy(generation_config)
        plain.guidance_scale = None  # the model's default is for images
        modality = ModalityLogitsProcessor(self.config.vocabulary, mode)
        return LogitsProcessorList([modality, *super()._get_logits_processor(plain)])


def _batching_mode(generation_config: GenerationConfig) -> str:
    mode = getattr(generation_config, "generation_mode", None) or "text"
    if mode not in ("text", "image"):
        raise ValueError(f"expected generation_mode 'text' or 'image' in continuous batching, got {mode!r}")
    return mode


def _refuse(guidance: BranchLogitsProcessor | None) -> None:
    if guidance is not None:
        raise ValueError(
            f"expected no guidance in continuous batching, got {vars(guidance)}; set guidance_scale=1 and leave the "
            "others out, or call generate"
        )


__all__ = ["CM3LeonBatchingMixin"]
