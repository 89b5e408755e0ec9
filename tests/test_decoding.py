"""Every strategy in generate(), against separate uncached forward passes, and with everything it goes together with."""

import pytest
import torch
from conftest import IMAGE_SIZE, TEXT_SIZE, draw, small_model
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cm3leon_hf import ContrastiveLogitsProcessor, ImageTextGuidanceLogitsProcessor, ModalityLogitsProcessor
from cm3leon_hf.generation_branches import guidance_of

IMAGE_LENGTH = 16
INSTRUCTION = "Describe the given picture."
STRATEGIES = {
    "cfg": {"guidance_scale": 3.0},
    "image+text": {"image_guidance_scale": 1.5, "guidance_scale": 4.0},
    "cd-k": {"contrastive_alpha": 0.2, "contrastive_k": 3},
}
GUIDED = [("image", strategy) for strategy in STRATEGIES] + [("text", "cfg"), ("text", "cd-k")]


@pytest.fixture(scope="module")
def prompts(processor):
    """For each mode a batch of mixed lengths in which every strategy finds something to leave out."""
    circle, square = draw("red", "circle"), draw("blue", "square")
    edits = processor.for_editing(circle, "blue"), processor.for_editing(square, "make it green")
    captions = processor.for_image_to_text(circle), processor.for_image_to_text(square, INSTRUCTION)
    return {"image": together(*edits), "text": together(*captions)}


def together(short: dict, long: dict) -> dict:
    """Two prompts as one batch."""
    padding = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    assert padding > 0
    ids = torch.cat([torch.nn.functional.pad(short["input_ids"], (padding, 0)), long["input_ids"]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def new_ids(model, inputs, **arguments) -> torch.Tensor:
    return model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]


def logits_of(model, prompt: str, codes, written: list[int], processor) -> torch.Tensor:
    """The logits of every written token in an uncached pass over one row."""
    ids = processor(text=prompt, image_codes=codes)["input_ids"][0].tolist()
    with torch.no_grad():
        return model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]


def test_editing_is_three_separate_runs_combined(model, processor):
    picture, change = draw("red", "circle"), "make it green"
    inputs = processor.for_editing(picture, change)
    output = model.generate(
        **inputs, generation_mode="image", image_guidance_scale=1.5, return_dict_in_generate=True, output_scores=True
    )
    drawn = output.sequences[0, -IMAGE_LENGTH:].tolist()
    codes, head = processor.encode_images(picture), "Edit first image following the instruction<break>"
    branches = [
        logits_of(model, f"{head}<image><break>{change}<break>", codes, drawn, processor),
        logits_of(model, f"{head}<image><break><mask><break>", codes, drawn, processor),
        logits_of(model, f"{head}<mask><break><mask><break>", None, drawn, processor),
    ]
    expected = ImageTextGuidanceLogitsProcessor(7.5, 1.5)(torch.zeros(IMAGE_LENGTH, 1), torch.cat(branches))
    torch.testing.assert_close(torch.cat(output.scores)[:, TEXT_SIZE:], expected[:, TEXT_SIZE:], rtol=1e-4, atol=1e-4)
    assert expected[:, TEXT_SIZE:].argmax(-1).add(TEXT_SIZE).tolist() == drawn


def test_contrastive_drawing_is_two_separate_runs_combined(model, processor):
    inputs = processor.for_text_to_image("a red circle")
    output = model.generate(
        **inputs, generation_mode="image", **STRATEGIES["cd-k"], return_dict_in_generate=True, output_scores=True
    )
    drawn = output.sequences[0, -IMAGE_LENGTH:].tolist()
    branches = [logits_of(model, f"{text}<break>", None, drawn, processor) for text in ("a red circle", "<mask>")]
    images = torch.cat(branches)[:, TEXT_SIZE:]  # equation 3 over the tokens that may follow
    expected = ContrastiveLogitsProcessor(0.2, 3)(torch.zeros(IMAGE_LENGTH, 1), images)
    got = torch.cat(output.scores)
    assert got[:, :TEXT_SIZE].isneginf().all()
    torch.testing.assert_close(got[:, TEXT_SIZE:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["cfg", "cd-k"])
def test_captions_are_guided_away_from_the_caption_of_nothing(model, processor, strategy):
    picture = draw("red", "circle")
    inputs = processor.for_image_to_text(picture, INSTRUCTION)
    arguments = {"max_new_tokens": 8, "eos_token_id": -1}
    guided = new_ids(model, inputs, **STRATEGIES[strategy], **arguments)
    blind = processor(text=f"{INSTRUCTION}<mask><break><mask><infill>")["input_ids"]
    assert torch.equal(
        new_ids(model, inputs, negative_prompt_ids=blind, **STRATEGIES[strategy], **arguments), guided
    )  # fmt: skip
    assert not torch.equal(new_ids(model, inputs, **arguments), guided)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value)

    def end(self):
        pass


@pytest.mark.parametrize("mode, strategy", GUIDED)
@pytest.mark.parametrize(
    "arguments, copies",
    [
        ({}, 1),
        ({"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 7, "num_return_sequences": 3}, 3),
        ({"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}, 1),
        ({"cache_implementation": "static"}, 1),
        ({"use_cache": False}, 1),
        ({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, 1),
        ({"streamer": True}, 1),
        ({"stopping_criteria": True}, 1),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_every_strategy_goes_with_everything(model, prompts, mode, strategy, arguments, copies):
    torch.manual_seed(0)
    fixed = {"generation_mode": mode, **STRATEGIES[strategy]} | ({"max_new_tokens": 9} if mode == "text" else {})
    arguments, inputs = dict(arguments), prompts[mode]
    if arguments.get("streamer"):
        arguments["streamer"] = Recorder()
        inputs = {name: value[:1] for name, value in inputs.items()}  # stock loops stream one row or all at once
    length = inputs["input_ids"].shape[1]
    if arguments.get("stopping_criteria"):
        stop = lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= length + 5)  # noqa: E731
        arguments["stopping_criteria"] = StoppingCriteriaList([stop])
    output = model.generate(**inputs, **fixed, **arguments)
    ids = (output if torch.is_tensor(output) else output.sequences)[:, length:]
    assert len(ids) == copies * len(inputs["input_ids"])
    wanted = 5 if "stopping_criteria" in arguments else IMAGE_LENGTH if mode == "image" else 9
    assert ids.shape[1] == wanted if mode == "image" else ids.shape[1] <= wanted
    assert ((ids >= TEXT_SIZE) == (mode == "image")).all()
    if "streamer" in arguments:
        assert torch.equal(torch.cat([value.flatten() for value in arguments["streamer"].values])[length:], ids[0])
    if "output_scores" in arguments:
        assert not torch.stack(output.scores).isnan().any()
        assert output.logits[0].shape == (len(ids) * (3 if strategy == "image+text" else 2), TEXT_SIZE + IMAGE_SIZE)
    if "cache_implementation" in arguments or "use_cache" in arguments:
        assert torch.equal(model.generate(**inputs, **fixed)[:, length:], ids)


@pytest.mark.parametrize("mode, strategy", GUIDED)
def test_transformers_own_processors_act_on_the_guided_scores(model, prompts, vocabulary, mode, strategy):
    sampling = {"repetition_penalty": 1.4, "temperature": 0.7, "top_k": 9, "top_p": 0.8}
    arguments = {"generation_mode": mode, "do_sample": True, "max_new_tokens": 6, "eos_token_id": -1}
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(0)
    output = model.generate(**prompts[mode], **STRATEGIES[strategy], **sampling, **arguments)
    order = [ModalityLogitsProcessor(vocabulary, mode), guidance_of(**STRATEGIES[strategy])]
    order += [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)]
    length = prompts[mode]["input_ids"].shape[1]
    for step, (scores, got) in enumerate(zip(output.logits, output.scores)):
        for processor in [*order, TopPLogitsWarper(0.8)]:
            scores = processor(output.sequences[:, : length + step], scores)
        assert torch.equal(got.isneginf(), scores.isneginf())
        torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    assert len(output.scores) == (IMAGE_LENGTH if mode == "image" else 6)


@pytest.mark.parametrize("mode, strategy", GUIDED)
def test_a_batch_of_mixed_lengths_is_its_single_runs(model, prompts, mode, strategy):
    arguments = {"generation_mode": mode, **STRATEGIES[strategy], "max_new_tokens": 8, "eos_token_id": -1}
    batch = new_ids(model, prompts[mode], **arguments)
    for row, ids, mask in zip(batch, *prompts[mode].values()):
        single = {"input_ids": ids[None, mask.bool()], "attention_mask": torch.ones(1, int(mask.sum()))}
        assert torch.equal(new_ids(model, single, **arguments)[0], row)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("mode, strategy", [("image", None), *GUIDED])
def test_the_prompt_is_read_once_for_all_its_candidates(model, prompts, mode, strategy, cache, monkeypatch):
    arguments = {"generation_mode": mode, "do_sample": True, **STRATEGIES.get(strategy, {}), **cache}
    arguments |= {"max_new_tokens": IMAGE_LENGTH, "eos_token_id": -1}
    many = {name: value.repeat_interleave(3, 0) for name, value in prompts[mode].items()}
    torch.manual_seed(0)
    expected = new_ids(model, many, **arguments)
    shapes, forward = [], model.model.forward

    def watched(input_ids, **rest):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model.model, "forward", watched)
    torch.manual_seed(0)
    assert torch.equal(new_ids(model, prompts[mode], num_return_sequences=3, **arguments), expected)
    branches = 3 if strategy == "image+text" else 2 if strategy else 1
    length = prompts[mode]["input_ids"].shape[1]
    assert shapes == [(2 * branches, length - 1), *[(6 * branches, 1)] * IMAGE_LENGTH]


@torch.no_grad()
def test_the_head_for_image_ids_alone(model):
    ids = torch.randint(6, TEXT_SIZE + IMAGE_SIZE, (2, 5))
    whole, part = model(ids).logits, model(ids, image_logits_only=True).logits
    torch.testing.assert_close(part, whole[..., TEXT_SIZE:])


@pytest.mark.parametrize("mode, strategy", GUIDED)
def test_a_compiled_forward_pass_generates_the_same(prompts, mode, strategy):
    """One graph without breaks; the static cache keeps every step of one shape."""
    torch._dynamo.reset()
    plain, compiled = small_model(), small_model()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled.forward = torch.compile(compiled.forward, backend=backend, fullgraph=True, dynamic=False)
    arguments = {"generation_mode": mode, "cache_implementation": "static", "max_new_tokens": 6, "eos_token_id": -1}
    arguments |= STRATEGIES[strategy]
    assert torch.equal(new_ids(compiled, prompts[mode], **arguments), new_ids(plain, prompts[mode], **arguments))
    assert len(graphs) == 2  # the prompt, and one for all tokens


def test_the_callers_processors_see_the_users_rows(model, prompts):
    seen = []

    def look(ids, scores):
        seen.append((len(ids), len(scores), bool(scores[:, :TEXT_SIZE].isneginf().all())))
        return scores

    for strategy in STRATEGIES.values():
        new_ids(
            model, prompts["image"], generation_mode="image", logits_processor=LogitsProcessorList([look]), **strategy
        )  # fmt: skip
    assert set(seen) == {(2, 2, True)}
