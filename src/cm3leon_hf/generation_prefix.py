"""A prompt is read once for all the sequences that are sampled from it."""

import torch
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerationMode

from .generation_branches import add_branches
from .generation_cache import make_room


def may_share_prefix(config: GenerationConfig, kwargs: dict) -> bool:
    """Whether several sequences are sampled from a prompt, with a plain cache, and nobody looks at the prompt."""
    watched = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    return (
        (config.num_return_sequences or 1) > 1
        and config.get_generation_mode(kwargs.get("assistant_model")) == GenerationMode.SAMPLE
        and config.use_cache is not False
        and config.cache_implementation in (None, "dynamic", "static")
        and kwargs.get("cache") is None
        and not config.prefill_chunk_size
        and not watched
    )


@torch.no_grad()
def shared_prefix(model, ids, attention_mask, config: GenerationConfig, kwargs: dict) -> Cache:
    """
    The cache of all prompts but their last token, computed once for all sequences of a prompt.

    Args:
        model ([`CM3LeonForCausalLM`]): The model.
        ids, attention_mask (`torch.LongTensor` of shape `(batch, length)`): The user's prompts.
        config ([`GenerationConfig`]): The call's.
        kwargs (`dict`): The call's further arguments, with the prompts of guidance if it is guided.

    Returns:
        A cache of the kind that `cache_implementation` says, with `is_shared_prefix`.
    """
    if "guidance_ids" in kwargs:
        ids = add_branches(ids, kwargs["guidance_ids"])
        attention_mask = add_branches(attention_mask, kwargs["guidance_attention_mask"])
    positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
    length = ids.shape[1] + config.max_new_tokens
    cache = make_room(DynamicCache(config=model.config), length)
    model.model(ids[:, :-1], attention_mask=attention_mask[:, :-1], position_ids=positions[:, :-1], cache=cache)
    cache.batch_repeat_interleave(config.num_return_sequences)
    if config.cache_implementation == "static":
        layers = cache.layers
        cache = StaticCache(config=model.config, max_cache_len=max(length, config.max_cache_len or 0))
        for index, layer in enumerate(layers):
            cache.update(layer.keys, layer.values, index)
    cache.is_shared_prefix = True
    return cache
