"""Candidates of several strategies, scored by CLIP: against a direct computation, in order, and never too few."""

import numpy as np
import pytest
import torch
from conftest import COLOURS, draw, load_recipe
from PIL import Image

from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.reranking import STRATEGIES, Candidate, EditScorer, draw_candidates, generate_best, rank

PROMPTS = ["a red circle", "blue"]


@pytest.fixture(scope="module")
def scorer(small_clip) -> CLIPScorer:
    return CLIPScorer(small_clip, None, device="cpu")


@torch.no_grad()
def test_scores_are_cosines(scorer):
    pictures, texts = [draw(colour, "circle") for colour in COLOURS], [f"a {colour} circle" for colour in COLOURS]
    scores = scorer(pictures, texts)
    for picture, text, score in zip(pictures, texts, scores):
        image = scorer.model.encode_image(scorer.transform(picture)[None])
        words = scorer.model.encode_text(scorer.tokenizer([text]))
        assert score == pytest.approx(torch.cosine_similarity(image, words).item(), abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 1
    with pytest.raises(ValueError, match="a text for each picture"):
        scorer(pictures, texts[:1])


@pytest.mark.parametrize("name, shares", [("cfg", {3.0: 5}), ("cd-k", {None: 5}), ("both", {3.0: 2, None: 3})])
def test_strategies_share_the_candidates(model, processor, name, shares):
    torch.manual_seed(0)
    pools = draw_candidates(model, processor, PROMPTS, 5, STRATEGIES[name])
    for pool in pools:
        drawn = [candidate.strategy.get("guidance_scale") for candidate in pool]
        assert {scale: drawn.count(scale) for scale in set(drawn)} == shares
    first, second = ([candidate.image.tobytes() for candidate in pool] for pool in pools)
    assert not set(first) & set(second)


def test_the_best_come_first(model, processor, scorer):
    torch.manual_seed(0)
    pools = draw_candidates(model, processor, PROMPTS, 6, STRATEGIES["both"])
    for pool, best, prompt in zip(pools, rank(pools, PROMPTS, scorer, keep=3), PROMPTS):
        expected = sorted(scorer([one.image for one in pool], [prompt] * 6), reverse=True)[:3]
        assert [one.score for one in best] == pytest.approx(expected)
        assert all(one.image in [other.image for other in pool] for one in best)
    torch.manual_seed(0)
    at_once = generate_best(model, processor, PROMPTS, scorer, candidates=6, keep=1)
    assert [pool[0].score for pool in at_once] == pytest.approx(
        [best[0].score for best in rank(pools, PROMPTS, scorer)]
    )


@torch.no_grad()
def test_edits_are_ranked_by_what_they_change_what_they_keep_and_what_most_agree_on(scorer):
    pictures, given = [draw(colour, "circle") for colour in COLOURS], draw("red", "square")
    pools = [[Candidate(picture, {}) for picture in pictures]]
    vectors = torch.cat([scorer.model.encode_image(scorer.transform(one)[None]) for one in [given, *pictures]])
    words = scorer.model.encode_text(scorer.tokenizer(["make it blue"]))
    mean = torch.nn.functional.normalize(vectors[1:], dim=-1).mean(0, keepdim=True)
    alike = sum(torch.cosine_similarity(vectors[1:], one) for one in (vectors[:1], words, mean))
    (ranked,) = rank(pools, ["make it blue"], EditScorer(given, scorer, scorer))
    assert [one.score for one in ranked] == pytest.approx(alike.sort(descending=True).values.tolist(), abs=1e-5)
    assert ranked[0].image == pictures[alike.argmax()] and len({round(one.score, 4) for one in ranked}) > 1


def test_too_few_candidates_are_refused(model, processor, scorer):
    with pytest.raises(ValueError, match="each of 2 strategies"):
        draw_candidates(model, processor, PROMPTS, 1, STRATEGIES["both"])
    with pytest.raises(ValueError, match="keep 1 to 4"):
        generate_best(model, processor, PROMPTS, scorer, candidates=4, keep=5)


def test_strategies_are_shown_side_by_side(folder, small_clip, tmp_path):
    recipe = load_recipe("pretrain/strategies.py")
    out = tmp_path / "strategies.png"
    arguments = {"model": folder, "tuned_model": folder, "clip_model": small_clip, "scales": [1.0, 3.0]}
    prompts, instructions = ["a red circle", "a blue square"], ["make it blue", "make it red"]
    recipe.main(recipe.StrategyArguments(str(out), prompts, instructions, candidates=2, **arguments))
    assert Image.open(out).width == 7 * (128 + 8) + 8  # two scales, CD-K, the best, a hole, filled, edited
    with pytest.raises(ValueError, match="an instruction for each of 2 prompts, got 1"):
        recipe.StrategyArguments(str(out), prompts, instructions[:1])


def test_a_hole_covers_what_its_mask_says():
    picture = Image.new("RGB", (12, 12), "red")
    holed, mask = load_recipe("pretrain/strategies.py").with_hole(picture)
    changed = np.any(np.array(holed) != np.array(picture), axis=-1)
    assert np.array_equal(changed, np.array(mask) > 0) and changed.sum() == 4 * 4
