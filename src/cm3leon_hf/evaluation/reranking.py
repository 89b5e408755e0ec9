"""Several candidates for each prompt or edit, and the best of them by CLIP (paper, Figure 4)."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

CFG = {"guidance_scale": 3.0, "top_p": 0.9}
CD_K = {"contrastive_alpha": 0.1, "contrastive_k": 8}
STRATEGIES = {"cfg": (CFG,), "cd-k": (CD_K,), "both": (CFG, CD_K)}


@dataclass(frozen=True)
class Candidate:
    """A picture, the strategy that drew it, and how well it fits its prompt; `None` before it is scored."""

    image: Image.Image
    strategy: dict
    score: float | None = None


def draw_candidates(
    model,
    processor,
    prompts: list[str],
    candidates: int,
    strategies=STRATEGIES["cfg"],
    streamer=None,
    retrieved: list[list[dict]] | None = None,
    **arguments,
) -> list[list[Candidate]]:
    """
    Draws candidates for every prompt, in equal shares of the strategies.

    Args:
        model ([`CM3LeonForCausalLM`]): Draws.
        processor ([`CM3LeonProcessor`]): Makes prompts and pictures.
        prompts (`list[str]`): What to draw.
        candidates (`int`): Pictures for each prompt, at least one for each strategy.
        strategies (sequence of `dict`): Arguments of `generate` that make each strategy.
        streamer (`Callable`, *optional*): Makes a streamer for each strategy's run.
        retrieved (`list[list[dict]]`, *optional*): Documents in front of each prompt; see
            [`~cm3leon_hf.processing_cm3leon.CM3LeonProcessor.for_text_to_image`].
        arguments: Further arguments of `generate`, for all strategies.

    Returns:
        For each prompt its candidates, in the order of the strategies.

    Raises:
        ValueError: if there are fewer candidates than strategies.
    """
    if candidates < len(strategies):
        raise ValueError(
            f"expected a candidate for each of {len(strategies)} strategies, got {candidates}; ask for more"
        )
    pools = [[] for _ in prompts]
    length = model.config.max_position_embeddings
    inputs = processor.for_text_to_image(prompts, retrieved, max_length=length).to(model.device)
    for index, strategy in enumerate(strategies):
        count = (candidates + index) // len(strategies)
        own = {"do_sample": True, "top_k": 0, "num_return_sequences": count} | strategy | arguments
        own |= {"streamer": streamer()} if streamer is not None else {}
        ids = model.generate(**inputs, generation_mode="image", **own)
        images = processor.post_process_multimodal_output(ids, generation_mode="image")
        for prompt, pool in enumerate(pools):
            pool += [Candidate(image, strategy) for image in images[prompt * count : (prompt + 1) * count]]
    return pools


def scores_of(
    pictures: list[Image.Image], prompt: str, scorer: Callable, given: Image.Image | None = None
) -> list[float]:
    """
    How well pictures fit a prompt: their similarity to it.

    Of edits, that to the instruction, for what they change, plus that to the given picture, for what they keep, plus
    that to the mean of all, for what most of them agree on, as in minimum Bayes risk decoding.
    """
    scores = scorer(pictures, [prompt] * len(pictures))
    if given is None:
        return scores
    return [sum(parts) for parts in zip(scores, scorer.likeness(pictures, given), scorer.consensus(pictures))]


def rank(
    pools: list[list[Candidate]],
    prompts: list[str],
    scorer: Callable,
    keep: int | None = None,
    given: list[Image.Image] | None = None,
) -> list[list[Candidate]]:
    """
    Scores candidates and sorts them, best first.

    Args:
        pools (`list[list[Candidate]]`): For each prompt its candidates.
        prompts (`list[str]`): The prompts, or the instructions of edits.
        scorer (`Callable`): Pictures and texts to similarities; [`~cm3leon_hf.evaluation.clip_score.CLIPScorer`].
        keep (`int`, *optional*): How many to return for each prompt; all by default.
        given (`list[PIL.Image.Image]`, *optional*): The pictures that the candidates are edits of.

    Returns:
        `list[list[Candidate]]`: for each prompt its best candidates with their scores.
    """
    ranked = []
    for pool, prompt, origin in zip(pools, prompts, given or [None] * len(pools)):
        scores = scores_of([candidate.image for candidate in pool], prompt, scorer, origin)
        scored = [Candidate(one.image, one.strategy, float(score)) for one, score in zip(pool, scores)]
        ranked.append(sorted(scored, key=lambda candidate: -candidate.score)[:keep])
    return ranked


def generate_best(
    model,
    processor,
    prompts: list[str],
    scorer: Callable,
    candidates=8,
    keep=1,
    strategies=STRATEGIES["both"],
    **arguments,
) -> list[list[Candidate]]:
    """
    The best `keep` of `candidates` pictures for each prompt; see [`draw_candidates`] and [`rank`].

    Raises:
        ValueError: if more are to be kept than drawn, or as [`draw_candidates`].
    """
    if not 1 <= keep <= candidates:
        raise ValueError(f"expected to keep 1 to {candidates} candidates, got {keep}; draw more or keep fewer")
    pools = draw_candidates(model, processor, prompts, candidates, strategies, **arguments)
    return rank(pools, prompts, scorer, keep)
