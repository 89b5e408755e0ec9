"""Speculative Jacobi decoding of image tokens: several tokens a pass, with the sampling distribution kept.

Teng et al. 2024 (arXiv 2410.01699). Each pass reads a window of drafts, which the pass before has sampled, behind the
tokens that are final. A draft is kept with probability min(1, p / q), where q is what it was sampled from and p what
the model now gives it; the first one that is not kept is drawn again from what p has above q. That is the rule of
speculative sampling, so what is final follows the model's own distribution; here the model drafts for itself.
"""

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .generation_images import ImageLogitsProcessor, of_all_ids


def check_jacobi(window: int, mode: str, config: GenerationConfig, cache: Cache | None) -> None:
    """Raises `ValueError` where a call asks for what speculative Jacobi decoding cannot do."""
    search = config.get_generation_mode()
    fits = search in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and config.use_cache is not False
    dynamic = config.cache_implementation in (None, "dynamic") and isinstance(cache, DynamicCache | None)
    if mode != "image" or window < 1 or not fits or not dynamic:
        raise ValueError(
            f"expected jacobi_window >= 1 for images by sampling or greedy search with the dynamic cache, got {window} "
            f"in {mode!r} mode by {search.value} with use_cache={config.use_cache} and "
            f"cache_implementation={config.cache_implementation}, cache {type(cache).__name__}; leave it out"
        )


@torch.no_grad()
def speculative_jacobi(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    window: int = 16,
    streamer=None,
    **model_kwargs,
):
    """
    Decodes one image for each row; for `generate(custom_generate=…)`.

    All rows go forward by as many tokens as the slowest of them; a row that could have kept more drafts keeps what it
    has kept so far and drafts the rest again, which leaves its distribution as it is.

    Args:
        model ([`CM3LeonForCausalLM`]): The model.
        input_ids (`torch.LongTensor` of shape `(batch, prompt_length)`): Prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config: As transformers prepares them.
        window (`int`): Drafts that a pass reads.
        streamer (`BaseStreamer`, *optional*): Gets the tokens one at a time.
        model_kwargs: The rest of what transformers prepares.

    Returns:
        As the stock loop; a `ModelOutput` holds sequences, scores and the cache.
    """
    cache = model_kwargs.pop("cache")
    mask = model_kwargs.pop("attention_mask", None)
    model_kwargs = {
        name: value for name, value in model_kwargs.items() if name not in ("position_ids", "logits_to_keep")
    }
    mask = torch.ones_like(input_ids) if mask is None else mask
    images = model.config.vocabulary.image_ids
    processor = ImageLogitsProcessor(logits_processor, model.config.vocabulary)
    drafts, drafted, scores = input_ids[:, :0], None, ()
    while input_ids.shape[1] < generation_config.max_length:
        length = input_ids.shape[1]
        drafts, drafted = _fill(drafts, drafted, min(window, generation_config.max_length - length - 1), images, model)
        rows = torch.cat([input_ids, drafts], dim=1)
        rows_mask = torch.nn.functional.pad(mask, (0, rows.shape[1] - mask.shape[1]), value=1)
        inputs = model.prepare_inputs_for_generation(
            rows,
            next_sequence_length=rows.shape[1] - cache.get_seq_length(),
            cache=cache,
            attention_mask=rows_mask,
            position_ids=(rows_mask.cumsum(1) - 1).clamp_min(0),
            **model_kwargs,
        )
        logits = model(**inputs, logits_to_keep=drafts.shape[1] + 1, image_logits_only=True).logits.float()
        new = [of_all_ids(processor(rows[:, : length + i], logits[:, i]), images) for i in range(drafts.shape[1] + 1)]
        probabilities = torch.stack([_distribution(one, generation_config.do_sample) for one in new], dim=1)
        tokens = verified(drafts, drafted, probabilities)
        tokens = tokens[:, : _stop(stopping_criteria, input_ids, tokens)]
        kept = tokens.shape[1]
        input_ids = torch.cat([input_ids, tokens], dim=1)
        scores += tuple(new[:kept])
        cache.crop(input_ids.shape[1] - 1 - rows.shape[1])
        drafted = probabilities[:, kept:]
        drafts = _sample(drafted)
        for column in tokens.T if streamer is not None else ():
            streamer.put(column.cpu())
        if stopping_criteria(input_ids, None).all():
            break
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=scores if generation_config.output_scores else None, cache=cache
    )


def verified(drafts: torch.LongTensor, drafted: torch.Tensor, probabilities: torch.Tensor) -> torch.LongTensor:
    """
    The tokens that are final after a pass: for every row the drafts that all rows keep, and one more.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, window)`): Drafts.
        drafted (`torch.Tensor` of shape `(batch, window, vocab_size)`): The distributions they were sampled from.
        probabilities (`torch.Tensor` of shape `(batch, window + 1, vocab_size)`): What the model gives now.

    Returns:
        `torch.LongTensor` of shape `(batch, 1 to window + 1)`.
    """
    window = drafts.shape[1]
    now, then = (table[:, :window].gather(2, drafts[..., None])[..., 0] for table in (probabilities, drafted))
    kept = (torch.rand_like(now) * then < now).long().cumprod(1).sum(1)  # drafts of each row up to the first refusal
    least = int(kept.min())
    if least == window:
        return torch.cat([drafts, _sample(probabilities[:, -1:])], dim=1)
    above = (probabilities[:, least] - drafted[:, least]).clamp_min(0)
    above = torch.where(above.sum(-1, keepdim=True) > 0, above, probabilities[:, least])  # p = q but for rounding
    again = _sample(above[:, None])[:, 0]
    last = torch.where(kept > least, drafts[:, least], again)
    return torch.cat([drafts[:, :least], last[:, None]], dim=1)


def _fill(drafts, drafted, wanted: int, images: slice, model):
    """Cuts the drafts to as many as wanted, or fills them up with image tokens drawn at random."""
    batch, missing = len(drafts), wanted - drafts.shape[1]
    if drafted is None:
        drafted = torch.zeros(batch, 0, model.config.vocab_size, device=drafts.device)
    if missing <= 0:
        return drafts[:, :wanted], drafted[:, :wanted]
    uniform = drafted.new_zeros(batch, missing, model.config.vocab_size)
    uniform[..., images] = 1 / (images.stop - images.start)
    return torch.cat([drafts, _sample(uniform)], dim=1), torch.cat([drafted, uniform], dim=1)


def _distribution(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """Scores `(batch, vocab_size)` to probabilities; all of it lies on the likeliest token where none is sampled."""
    if do_sample:
        return scores.softmax(-1)
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)


def _sample(probabilities: torch.Tensor) -> torch.LongTensor:
    """One token for each of `(batch, length, vocab_size)` distributions, which need not be normalised."""
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1) if probabilities.shape[1] else probabilities.new_zeros(0)
    return drawn.long().view(probabilities.shape[:2])


def _stop(stopping_criteria: StoppingCriteriaList, input_ids: torch.LongTensor, tokens: torch.LongTensor) -> int:
    """How many of the new tokens stand before the criteria stop every row."""
    for count in range(1, tokens.shape[1]):
        if stopping_criteria(torch.cat([input_ids, tokens[:, :count]], dim=1), None).all():
            return count
    return tokens.shape[1]
