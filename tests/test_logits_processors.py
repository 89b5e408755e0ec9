"""Logits processors against plain NumPy transcriptions of the paper's equations, and against any pattern of −inf."""

import re

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, TEXT_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.generation import ClassifierFreeGuidanceLogitsProcessor

from cm3leon_hf import (
    BatchedGuidanceLogitsProcessor,
    ContrastiveLogitsProcessor,
    ImageTextGuidanceLogitsProcessor,
    KnownTokenLogitsProcessor,
    ModalityLogitsProcessor,
    TextHolesLogitsProcessor,
)

ROWS, SIZE = 3, 40
IDS = torch.zeros(ROWS, 5, dtype=torch.long)
IMAGE_LENGTH = 16


def scores_of(branches: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(branches * ROWS, SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def contrastive(expert: np.ndarray, amateur: np.ndarray, alpha: float, k: int) -> np.ndarray:
    """The paper's CD and its equation 3, for one row."""
    p_exp, p_ama = softmax(expert), softmax(amateur)
    kmax = sorted(p_exp, reverse=True)[k - 1]
    return np.array([np.log(e / a) if e >= alpha * kmax else -np.inf for e, a in zip(p_exp, p_ama)])


@pytest.mark.parametrize("scale", [0, 1, 3.0, 7.5])
def test_classifier_free_guidance_is_equation_2(scale):
    scores = scores_of(2)
    conditional, unconditional = scores.numpy().reshape(2, ROWS, SIZE)
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(BatchedGuidanceLogitsProcessor(scale)(IDS, scores), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text_scale, image_scale", [(7.5, 1.5), (1, 1), (0, 2.0), (3.0, 0)])
def test_image_and_text_guidance_is_its_equation(text_scale, image_scale):
    scores = scores_of(3)
    both, image, neither = scores.numpy().reshape(3, ROWS, SIZE)
    expected = neither + image_scale * (image - neither) + text_scale * (both - image)
    got = ImageTextGuidanceLogitsProcessor(text_scale, image_scale)(IDS, scores)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha, k", [(0.1, 8), (0.1, 1), (1.0, 1), (1.0, SIZE), (0.5, 3)])
def test_contrastive_decoding_is_equation_3(alpha, k):
    scores = scores_of(2)
    experts, amateurs = scores.double().numpy().reshape(2, ROWS, SIZE)
    expected = [contrastive(expert, amateur, alpha, k) for expert, amateur in zip(experts, amateurs)]
    got = ContrastiveLogitsProcessor(alpha, k)(IDS, scores.double())
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert (got.isfinite().sum(1) >= k).all()


def test_contrastive_decoding_keeps_what_may_follow_when_that_is_fewer_than_k():
    scores = scores_of(2)
    scores[:, 3:] = -torch.inf
    got = ContrastiveLogitsProcessor(0.1, 8)(IDS, scores)
    assert (got.isfinite() == torch.tensor([True] * 3 + [False] * (SIZE - 3))).all()


@pytest.mark.parametrize(
    "processor",
    [
        BatchedGuidanceLogitsProcessor(3.0),
        BatchedGuidanceLogitsProcessor(0),
        ImageTextGuidanceLogitsProcessor(),
        ContrastiveLogitsProcessor(0.1, 8),
        ContrastiveLogitsProcessor(1.0, 1),
    ],
    ids=lambda processor: type(processor).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan_leaves_a_processor_and_what_is_forbidden_stays_so(processor, dtype):
    for seed in range(50):
        scores = scores_of(processor.branches, seed).to(dtype)
        share = (0.1, 0.5, 0.95, 1.0)[seed % 4]
        forbidden = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < share
        forbidden[seed % len(scores)] = True  # a whole row
        got = processor(IDS, scores.masked_fill(forbidden, -torch.inf))
        assert not got.isnan().any() and not got.isposinf().any()
        assert got[forbidden.view(processor.branches, ROWS, SIZE).any(0)].isneginf().all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]), data=st.data())
def test_no_nan_leaves_those_that_forbid_and_force(seed, share, data, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, vocabulary.size, generator=generator)
    forbidden = torch.rand(scores.shape, generator=generator) < share
    ids = torch.randint(1, vocabulary.size, (4, 7), generator=generator)
    ids[:, -1] = data.draw(st.sampled_from([1, 2, 300, TEXT_SIZE]))
    known = torch.randint(-1, 1, (2, 3), generator=generator) * TEXT_SIZE + TEXT_SIZE - 1
    processors = [ModalityLogitsProcessor(vocabulary, mode, 60) for mode in ("text", "image", "interleaved")]
    processors += [KnownTokenLogitsProcessor(known, 6), TextHolesLogitsProcessor(vocabulary, [[[300, 301]]] * 2, 5)]
    for processor in processors:
        got = processor(ids, scores.masked_fill(forbidden, -torch.inf))
        assert not got.isnan().any() and not got.isposinf().any()
        forced = got.isfinite().sum(1) == 1  # a known token is forced whatever was forbidden
        assert got[forbidden & ~forced[:, None]].isneginf().all()


def test_they_serve_a_model_that_is_not_ours():
    """Janus draws with two branches in one batch as well; its processor and ours agree on its logits."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 50, "num_key_value_heads": 2, **tiny},
        vision_config={"image_size": 16, "patch_size": 8, "projection_dim": 16, "depth": 1, **tiny},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": SIZE,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 16,
            "image_token_embed_dim": 16,
            "num_patches": 4,
            "latent_channels": 8,
        },
    )
    torch.manual_seed(0)
    janus = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        hidden = janus.model.language_model(torch.randint(0, 50, (2 * ROWS, 7))).last_hidden_state[:, -1]
        logits = janus.model.generation_head(hidden)
    assert logits.shape == (2 * ROWS, SIZE)
    theirs = ClassifierFreeGuidanceLogitsProcessor(5.0)(IDS, logits)
    torch.testing.assert_close(BatchedGuidanceLogitsProcessor(5.0)(IDS, logits), theirs)
    assert ContrastiveLogitsProcessor()(IDS, logits).isfinite().any(1).all()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: BatchedGuidanceLogitsProcessor(-1), "guidance_scale >= 0"),
        (lambda: ImageTextGuidanceLogitsProcessor(7.5, float("nan")), "image_guidance_scale >= 0"),
        (lambda: ContrastiveLogitsProcessor(0.0), r"contrastive_alpha in \(0, 1\]"),
        (lambda: ContrastiveLogitsProcessor(1.1), r"contrastive_alpha in \(0, 1\]"),
        (lambda: ContrastiveLogitsProcessor(0.1, 0), "at least 1"),
        (lambda: ContrastiveLogitsProcessor(0.1, 2.5), "at least 1"),
        (lambda: ContrastiveLogitsProcessor(0.1, SIZE + 1)(IDS, scores_of(2)), f"at most {SIZE}"),
        (lambda: BatchedGuidanceLogitsProcessor(2.0)(IDS, scores_of(1)), "expected 6 rows"),
        (lambda: ImageTextGuidanceLogitsProcessor()(IDS, scores_of(2)), "expected 9 rows"),
    ],
)
def test_values_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_which_ids_each_mode_lets_follow(vocabulary):
    scores = torch.zeros(1, vocabulary.size)
    allowed = {
        mode: ModalityLogitsProcessor(vocabulary, mode)(None, scores)[0].isfinite().nonzero().flatten().tolist()
        for mode in ("text", "image")
    }
    assert allowed["text"] == [vocabulary.eos_id, *range(6, TEXT_SIZE)]
    assert allowed["image"] == list(range(TEXT_SIZE, TEXT_SIZE + IMAGE_SIZE))


def shape_of(row: torch.Tensor, vocabulary) -> str:
    """A row as letters: text, image, break, end, padding."""
    letters = {vocabulary.pad_id: "p", vocabulary.eos_id: "e", vocabulary.break_id: "b"}
    return "".join(letters.get(i, "i" if i >= TEXT_SIZE else "t") for i in row.tolist())


def test_the_interleaved_grammar_lets_whole_images_follow_only(vocabulary):
    """A random walk that takes any token the grammar allows, breaks and ends more often."""
    grammar = ModalityLogitsProcessor(vocabulary, "interleaved", max_length=60)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        ids = torch.tensor([[0, 1, 300]])
        while ids.shape[1] < 60 and ids[0, -1] != vocabulary.eos_id:
            scores = torch.zeros(2, vocabulary.size)  # two branches of one row
            scores[:, vocabulary.break_id], scores[:, vocabulary.eos_id] = 5.5, 4.5
            both = grammar(ids, scores)
            assert torch.equal(both[0], both[1])
            ids = torch.cat([ids, torch.multinomial(both[:1].softmax(-1), 1, generator=generator)], dim=1)
        shape = shape_of(ids[0], vocabulary)
        assert re.fullmatch(rf"pet+(bi{{{IMAGE_LENGTH}}}(bt+|$|(?=e)))*b?(?<!ib)e?", shape), shape
        seen.add(shape.count("b" + "i" * IMAGE_LENGTH))
    assert {0, 1, 2} <= seen


def test_known_tokens_are_forced_and_the_others_left_alone():
    known = torch.tensor([[-1, 7], [5, -1]])
    processor = KnownTokenLogitsProcessor(known, prompt_length=3)
    scores = torch.randn(4, 10).masked_fill(torch.eye(4, 10).bool(), -torch.inf)  # two sequences for each prompt
    first = processor(torch.zeros(4, 3), scores)
    assert torch.equal(first[:2], scores[:2])
    assert first[2:].argmax(1).tolist() == [5, 5] and (first[2:].softmax(-1).max(1).values == 1).all()
    second = processor(torch.zeros(4, 4), scores)
    assert second[:2].argmax(1).tolist() == [7, 7] and torch.equal(second[2:], scores[2:])


def test_text_holes_are_closed_by_the_next_piece(vocabulary):
    processor = TextHolesLogitsProcessor(vocabulary, [[[300, 301], [302]]], prompt_length=1, max_hole_tokens=3)

    def follows(*written: int) -> set[int]:
        scores = processor(torch.tensor([[1, *written]]), torch.zeros(1, vocabulary.size))
        return set(scores[0].isfinite().nonzero().flatten().tolist())

    everything = set(range(vocabulary.size))
    assert follows() == everything - {vocabulary.eos_id, 300}  # a hole holds something
    assert follows(400) == everything - {vocabulary.eos_id}
    assert follows(400, 300) == {301}  # a piece is closed once begun
    assert follows(400, 401, 402) == {300}  # a hole does not go on for ever
    assert follows(400, 300, 301) == everything - {vocabulary.eos_id, 302}
    assert follows(400, 300, 301, 401, 302) == everything  # the last hole is free
