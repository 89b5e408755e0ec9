"""Several candidates for each prompt or edit, and the best of them by CLIP (paper, Figure 4)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.functional import normalize

CFG = {"guidance_scale": 3.0, "top_p": 0.9}
CD_K = {"contrastive_alpha": 0.1, "contrastive_k": 8}
GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
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


@dataclass(frozen=True)
class EditScorer:
    """
    How well edits of a picture fit an instruction, for [`rank`].

    The sum of three similarities: to the instruction, for what they change; to the given picture, for what they keep;
    and to the mean of all, for what most of them agree on, as in minimum Bayes risk decoding.

    Args:
        given (`PIL.Image.Image`): What the pictures are edits of.
        ranker ([`~cm3leon_hf.evaluation.clip_score.CLIPScorer`]): Compares them with instructions.
        clip ([`~cm3leon_hf.evaluation.clip_score.CLIPScorer`]): Compares them with pictures. It need not tell styles: a
            thing in another style is to be like itself.
    """

    given: Image.Image
    ranker: Callable
    clip: Callable

    def __call__(self, pictures: list[Image.Image], instructions: list[str]) -> list[float]:
        asked = torch.tensor(self.ranker(pictures, instructions))
        given, *drawn = self.clip.embed_images([self.given, *pictures]).cpu()
        drawn = torch.stack(drawn)
        return (asked + drawn @ (given + normalize(drawn.mean(dim=0), dim=0))).tolist()


def best_texts_of(
    inputs, pictures: list[Image.Image], model, processor, ranker, candidates: int, **arguments
) -> list[str]:
    """
    The text about each picture, of the likeliest ones, that model and CLIP agree on best.

    Beam search finds the candidates. The one is kept whose probability under the model, times its probability under
    CLIP among the candidates, is largest: a product of experts, of which the second one has seen the pixels.

    Args:
        inputs (`BatchFeature`): Prompts, as the processor makes them, one for each picture.
        pictures (`list[PIL.Image.Image]`): In RGB.
        model ([`CM3LeonForCausalLM`]): Writes.
        processor ([`CM3LeonProcessor`]): Makes texts of ids.
        ranker ([`~cm3leon_hf.evaluation.clip_score.CLIPScorer`]): Compares texts with pictures.
        candidates (`int`): Beams for each picture.
        arguments: Further arguments of `generate`.
    """
    several = {"num_beams": candidates, "num_return_sequences": candidates, "length_penalty": 0.0}
    several |= {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, generation_mode="text", **GREEDY | arguments | several)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.post_process_multimodal_output(new, generation_mode="text")]
    repeated = [picture for picture in pictures for _ in range(candidates)]
    scores = found.sequences_scores.cpu() + ranker.scale * torch.tensor(ranker(repeated, texts))
    best = scores.view(-1, candidates).argmax(dim=1).tolist()
    return [texts[row * candidates + at] for row, at in enumerate(best)]


def rank(
    pools: list[list[Candidate]],
    prompts: list[str],
    scorer: Callable,
    keep: int | None = None,
) -> list[list[Candidate]]:
    """
    Scores candidates and sorts them, best first.

    Args:
        pools (`list[list[Candidate]]`): For each prompt its candidates.
        prompts (`list[str]`): The prompts, or the instructions of edits.
        scorer (`Callable`): Pictures and texts to scores; a [`~cm3leon_hf.evaluation.clip_score.CLIPScorer`], or of
            edits an [`EditScorer`].
        keep (`int`, *optional*): How many to return for each prompt; all by default.

    Returns:
        `list[list[Candidate]]`: for each prompt its best candidates with their scores.
    """
    ranked = []
    for pool, prompt in zip(pools, prompts):
        scores = scorer([candidate.image for candidate in pool], [prompt] * len(pool))
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
