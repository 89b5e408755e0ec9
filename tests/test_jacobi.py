"""Speculative Jacobi decoding: the tokens of greedy search, or the distribution of sampling, in fewer passes."""

import pytest
import torch
from conftest import IMAGE_SIZE, TEXT_SIZE, draw, small_config, small_model
from transformers import StaticCache, StoppingCriteriaList
from transformers.generation import BaseStreamer

from cm3leon_hf.generation_jacobi import verified

IMAGE_LENGTH = 16
MASK = draw("black", "square")  # white all around the square
PROMPTS = ["a red circle on white", "blue"]


def new_ids(model, inputs, **arguments) -> torch.Tensor:
    return model.generate(**inputs, generation_mode="image", **arguments)[:, inputs["input_ids"].shape[1] :]


def independence_p_value(first: torch.Tensor, second: torch.Tensor, values: int) -> float:
    """Pearson's chi-square test that two samples of integers come from one distribution; rare values are pooled."""
    counts = torch.stack([torch.bincount(sample, minlength=values) for sample in (first, second)]).double()
    common = counts.sum(0) >= 20
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0, dtype=torch.double)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.5}, {"contrastive_k": 3}], ids=str)
@pytest.mark.parametrize("window", [1, 5, 40])
def test_greedy_search_stays_as_it_is(model, processor, guidance, window):
    inputs = processor.for_text_to_image(PROMPTS)
    assert torch.equal(
        new_ids(model, inputs, jacobi_window=window, do_sample=False, **guidance),
        new_ids(model, inputs, do_sample=False, **guidance),
    )


def test_edits_stay_as_they_are(model, processor):
    inputs = processor.for_editing([draw("red", "circle"), draw("blue", "square")], "make it green")
    guidance = {"image_guidance_scale": 1.5, "guidance_scale": 4.0}
    plain = new_ids(model, inputs, **guidance)
    assert torch.equal(new_ids(model, inputs, jacobi_window=4, **guidance), plain)
    assert not torch.equal(new_ids(model, inputs), plain)


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0, "top_p": 0.9, "temperature": 0.8}], ids=str)
def test_samples_keep_their_distribution(model, processor, guidance):
    """Single tokens and pairs of neighbours, 3000 pictures each way; significance 0.001 for each of six tests."""
    inputs = processor.for_text_to_image("a red circle")
    arguments = {"do_sample": True, "num_return_sequences": 100, "top_k": 0, **guidance}
    torch.manual_seed(0)
    plain = torch.cat([new_ids(model, inputs, **arguments) for _ in range(30)]) - TEXT_SIZE
    fast = torch.cat([new_ids(model, inputs, jacobi_window=6, **arguments) for _ in range(30)]) - TEXT_SIZE
    for place in (1, 5, 15):
        assert independence_p_value(plain[:, place], fast[:, place], IMAGE_SIZE) > 0.001
        pairs = [ids[:, place - 1] * IMAGE_SIZE + ids[:, place] for ids in (plain, fast)]
        assert independence_p_value(*pairs, IMAGE_SIZE**2) > 0.001
    colder = torch.cat([new_ids(model, inputs, **arguments | {"temperature": 0.6}) for _ in range(30)]) - TEXT_SIZE
    assert independence_p_value(plain[:, 5], colder[:, 5], IMAGE_SIZE) < 1e-6  # the test sees a difference


def test_the_rule_keeps_any_distribution_whatever_drafted():
    """Every row of a batch, though all rows go forward together; 20000 rows, significance 0.001."""
    torch.manual_seed(0)
    now, then = torch.rand(2, 1, 3, 8) ** 3
    now, then = now / now.sum(-1, keepdim=True), then / then.sum(-1, keepdim=True)
    results = []
    for _ in range(10000):
        drafts = torch.multinomial(then[0, :2], 2, replacement=True).T.contiguous()
        results.append(verified(drafts, then[:, :2].expand(2, -1, -1), now.expand(2, -1, -1)))
    for place in range(2):
        seen = torch.cat([result[:, place] for result in results if result.shape[1] > place])
        wanted = torch.multinomial(now[0, place], len(seen), replacement=True)
        assert independence_p_value(seen, wanted, 8) > 0.001


def test_it_takes_fewer_passes_where_the_next_token_is_sure(processor):
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 30  # peaked, and the positions alone decide
        model.model.embed_tokens.weight *= 1e-3
    calls, forward = [], model.model.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.model.forward = counted
    model.generate(
        **processor.for_text_to_image("blue"), generation_mode="image", guidance_scale=2.0, jacobi_window=8
    )  # fmt: skip
    assert len(calls) <= IMAGE_LENGTH / 2


def test_it_goes_with_everything(model, processor):
    class Recorder(BaseStreamer):
        values: list = []

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.values.append(None)

    inputs = processor.for_infilling(draw("red", "circle"), MASK, "a red circle")
    known = inputs["known_ids"]
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        generation_mode="image",
        jacobi_window=4,
        do_sample=True,
        guidance_scale=2.0,
        repetition_penalty=1.3,
        streamer=Recorder(),
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert ids.shape == known.shape and ((ids == known) | (known < 0)).all()
    assert torch.equal(torch.stack(Recorder.values[1:-1], dim=1), ids) and Recorder.values[-1] is None
    assert len(output.scores) == ids.shape[1] and not torch.stack(output.scores).isnan().any()
    length = inputs["input_ids"].shape[1]
    stop = lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= length + 3)  # noqa: E731
    stopped = model.generate(
        **inputs, generation_mode="image", jacobi_window=8, stopping_criteria=StoppingCriteriaList([stop])
    )
    assert stopped.shape[1] == length + 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"jacobi_window": 0},
        {"generation_mode": "text"},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"cache": StaticCache(config=small_config(), max_cache_len=32)},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(arguments):
    model = small_model()
    model.model.forward = None  # nothing may run
    with pytest.raises(ValueError, match="jacobi_window >= 1"):
        model.generate(torch.tensor([[1, 300, 2]]), **{"generation_mode": "image", "jacobi_window": 4} | arguments)
