"""generate(): guidance against separate runs and transformers' own, the exact length of images, bad input."""

import copy

import pytest
import torch
from conftest import IMAGE_SIZE, POSITIONS, TEXT_SIZE, small_model
from test_modeling import as_opt
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from cm3leon_hf import ModalityLogitsProcessor

PROMPTS = ["a red circle on white", "blue"]
IMAGE_LENGTH = 16


@pytest.fixture(scope="module")
def inputs(processor):
    return processor.for_text_to_image(PROMPTS)


def new_ids(model, inputs, **arguments) -> torch.Tensor:
    return model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]


def assert_images(ids: torch.Tensor, rows: int) -> None:
    assert ids.shape == (rows, IMAGE_LENGTH)
    assert ((ids >= TEXT_SIZE) & (ids < TEXT_SIZE + IMAGE_SIZE)).all()


class Recorder(BaseStreamer):
    def __init__(self):
        self.put_values, self.ended = [], False

    def put(self, value):
        self.put_values.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize(
    "arguments, rows",
    [
        ({}, 2),
        ({"do_sample": True}, 2),
        ({"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "temperature": 1.3}, 6),
        ({"num_beams": 3, "guidance_scale": None}, 2),
        ({"use_cache": False}, 2),
        ({"cache_implementation": "static"}, 2),
        ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 4}, 2),
        ({"max_new_tokens": 3}, 2),
        ({"max_length": 10}, 2),
        ({"min_new_tokens": 5, "forced_eos_token_id": 1}, 2),
        ({"eos_token_id": 1, "suppress_tokens": [600, 601]}, 2),
        ({"bad_words_ids": [[605]], "renormalize_logits": True}, 2),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_image_mode_yields_one_image_and_nothing_else(model, inputs, arguments, rows, guidance_scale):
    torch.manual_seed(0)
    arguments = {"guidance_scale": guidance_scale} | arguments
    ids = new_ids(model, inputs, generation_mode="image", **arguments)
    assert_images(ids, rows)
    banned = arguments.get("suppress_tokens", [605] if "bad_words_ids" in arguments else [-1])
    assert not torch.isin(ids, torch.tensor(banned)).any()


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "num_return_sequences": 4}, {"num_beams": 2}])
def test_text_mode_yields_no_image_and_no_control_token(model, inputs, vocabulary, arguments):
    torch.manual_seed(0)
    ids = new_ids(model, inputs, max_new_tokens=30, **arguments)
    assert not vocabulary.is_image(ids).any()
    controls = torch.tensor([vocabulary.break_id, vocabulary.mask_id, vocabulary.infill_id, vocabulary.image_id])
    assert not torch.isin(ids, controls).any()
    padded = (ids == vocabulary.pad_id) & ((ids == vocabulary.eos_id).cumsum(1) == 0)
    assert not padded.any()  # padding stands behind <eos> only


def test_text_ends_at_eos(inputs, vocabulary):
    model = small_model()
    with torch.no_grad():  # makes <eos> likely after a while
        model.lm_head.weight[vocabulary.eos_id] *= 4
    torch.manual_seed(0)
    ids = new_ids(model, inputs, max_new_tokens=40, do_sample=True, num_return_sequences=8)
    ended = (ids == vocabulary.eos_id).any(1)
    assert ended.any()
    behind = (ids == vocabulary.eos_id).cumsum(1).roll(1, 1)[:, 1:] > 0
    assert (ids[:, 1:][behind] == vocabulary.pad_id).all()


@torch.no_grad()
def test_guidance_is_two_separate_runs_combined(model, inputs, processor):
    output = model.generate(
        **inputs, generation_mode="image", guidance_scale=3.0, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences.shape[0] == 2 and len(output.scores) == IMAGE_LENGTH
    for row, prompt in enumerate(PROMPTS):
        drawn = output.sequences[row, -IMAGE_LENGTH:]
        logits = []
        for text in (f"<eos>{prompt}<break>", "<eos><mask><break>"):
            ids = torch.tensor([processor.tokenizer(text)["input_ids"] + drawn.tolist()])
            logits.append(model(ids).logits[0, -IMAGE_LENGTH - 1 : -1, TEXT_SIZE:])
        conditional, unconditional = logits
        expected = unconditional + 3.0 * (conditional - unconditional)
        scores = torch.stack([step[row] for step in output.scores])
        torch.testing.assert_close(scores[:, TEXT_SIZE:], expected, rtol=1e-4, atol=1e-4)
        assert scores[:, :TEXT_SIZE].isneginf().all()
        assert torch.equal(expected.argmax(-1) + TEXT_SIZE, drawn)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_guidance_draws_what_transformers_draws(model, inputs, processor, cache):
    """transformers guides with a second forward pass over a cache of its own."""
    ours = new_ids(model, inputs, generation_mode="image", guidance_scale=2.5, **cache)
    opt = as_opt(model)
    for row, prompt in zip(ours, PROMPTS):
        own, other = (torch.tensor([processor.tokenizer(f"<eos>{t}<break>")["input_ids"]]) for t in (prompt, "<mask>"))
        theirs = opt.generate(
            own,
            guidance_scale=2.5,
            negative_prompt_ids=other,
            max_new_tokens=IMAGE_LENGTH,
            logits_processor=LogitsProcessorList([ModalityLogitsProcessor(model.config.vocabulary, "image")]),
        )
        assert torch.equal(row, theirs[0, -IMAGE_LENGTH:])


def test_text_is_guided_away_from_negative_prompts(model, processor):
    inputs, negative = processor(text="a red"), processor(text="blue square on")
    ours = new_ids(
        model, inputs, guidance_scale=2.5, negative_prompt_ids=negative["input_ids"], max_new_tokens=12, eos_token_id=-1
    )
    theirs = as_opt(model).generate(
        inputs["input_ids"],
        guidance_scale=2.5,
        negative_prompt_ids=negative["input_ids"],
        max_new_tokens=12,
        eos_token_id=-1,
        logits_processor=LogitsProcessorList([ModalityLogitsProcessor(model.config.vocabulary, "text")]),
    )
    assert torch.equal(ours[0], theirs[0, -12:])
    assert not torch.equal(ours, new_ids(model, inputs, max_new_tokens=12, eos_token_id=-1))


@pytest.mark.parametrize("mode, guidance_scale", [("image", 1.0), ("image", 3.0), ("text", 1.0)])
def test_a_batch_of_mixed_lengths_is_its_single_runs(model, processor, inputs, mode, guidance_scale):
    arguments = {"generation_mode": mode, "guidance_scale": guidance_scale, "max_new_tokens": 12}
    batch = new_ids(model, inputs, **arguments)
    for row, prompt in zip(batch, PROMPTS):
        single = new_ids(model, processor.for_text_to_image([prompt]), **arguments)[0]
        assert torch.equal(row[: len(single)], single)
        assert (row[len(single) :] == 0).all()


def test_padding_on_the_right_or_too_much_of_it_changes_nothing(model, inputs):
    expected = new_ids(model, inputs, generation_mode="image", guidance_scale=2.0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    right = {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
    wide = {name: torch.nn.functional.pad(value, (5, 0)) for name, value in inputs.items()}
    for moved in (right, wide, {"input_ids": wide["input_ids"]}):  # without a mask, padding is recognised by its id
        ids = model.generate(**moved, generation_mode="image", guidance_scale=2.0)
        assert torch.equal(ids[:, moved["input_ids"].shape[1] :], expected)


def test_guidance_of_one_is_none_and_of_zero_forgets_the_text(model, inputs, processor):
    draw = lambda batch, **arguments: new_ids(model, batch, generation_mode="image", **arguments)  # noqa: E731
    plain = draw(inputs)
    assert torch.equal(draw(inputs, guidance_scale=1.0), plain)
    assert torch.equal(draw(inputs, guidance_scale=None), plain)
    without = draw(processor.for_text_to_image(["<mask>"]))
    assert torch.equal(draw(inputs, guidance_scale=0), without.repeat(2, 1))
    assert not torch.equal(draw(inputs, guidance_scale=3.0), plain)


def test_guided_samples_follow_the_seed_and_differ_among_themselves(model, inputs):
    arguments = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = new_ids(model, inputs, **arguments)
    torch.manual_seed(1)
    assert torch.equal(new_ids(model, inputs, **arguments), first)
    assert len(first.unique(dim=0)) == 6


def test_a_long_negative_prompt_does_not_widen_the_output(model, inputs, processor):
    negative = processor(text="a green square on white, " * 3)["input_ids"]
    for mode in ("image", "text"):
        ids = model.generate(
            **inputs, generation_mode=mode, guidance_scale=2.0, negative_prompt_ids=negative, max_new_tokens=16
        )
        assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    output = model.generate(
        **inputs, guidance_scale=2.0, negative_prompt_ids=negative, max_new_tokens=16, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, ids)


def test_one_negative_prompt_serves_all(model, inputs, processor):
    negative = processor(text="green")["input_ids"]
    arguments = {"generation_mode": "image", "guidance_scale": 3.0}
    one = new_ids(model, inputs, negative_prompt_ids=negative, **arguments)
    assert torch.equal(new_ids(model, inputs, negative_prompt_ids=negative.repeat(2, 1), **arguments), one)
    assert not torch.equal(new_ids(model, inputs, **arguments), one)
    with pytest.raises(ValueError, match="one negative prompt"):
        new_ids(model, inputs, negative_prompt_ids=negative.repeat(3, 1), **arguments)


def test_the_prompt_gets_its_break_once(model, processor, vocabulary):
    bare = model.generate(**processor(text="a red circle"), generation_mode="image", guidance_scale=2.0)
    whole = model.generate(**processor.for_text_to_image("a red circle"), generation_mode="image", guidance_scale=2.0)
    assert torch.equal(bare, whole)
    assert (whole == vocabulary.break_id).sum() == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_streamers_see_the_users_rows(model, processor, guidance_scale):
    streamer = Recorder()
    inputs = processor.for_text_to_image(PROMPTS[:1])
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=guidance_scale, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat([value.flatten() for value in streamer.put_values]), ids[0])


class StopAfter(StoppingCriteria):
    def __init__(self, length: int):
        self.length, self.shapes = length, set()

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.add(input_ids.shape[0])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_the_callers_processors_see_the_users_rows(model, inputs):
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((scores.shape, scores[:, :TEXT_SIZE].isneginf().all().item()))
            return scores

    stop = StopAfter(inputs["input_ids"].shape[1] + 4)
    output = model.generate(
        **inputs,
        generation_mode="image",
        guidance_scale=3.0,
        stopping_criteria=StoppingCriteriaList([stop]),
        logits_processor=LogitsProcessorList([Look()]),
    )
    assert output.shape[1] == stop.length and stop.shapes == {2}
    assert seen == [((2, TEXT_SIZE + IMAGE_SIZE), True)] * 4  # the modality is decided before the caller's turn


def test_outputs_as_a_dictionary(model, inputs):
    output = model.generate(
        **inputs,
        generation_mode="image",
        guidance_scale=3.0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert_images(output.sequences[:, -IMAGE_LENGTH:], 2)
    assert output.scores[0].shape == (2, TEXT_SIZE + IMAGE_SIZE)
    assert output.logits[0].shape == (4, TEXT_SIZE + IMAGE_SIZE)  # raw: the rows of guidance too
    assert not any(score.isnan().any() for score in output.scores)
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert scores.shape == (2, IMAGE_LENGTH) and scores.isfinite().all()


def test_arguments_may_come_from_a_generation_config(model, inputs):
    expected = new_ids(model, inputs, generation_mode="image", guidance_scale=3.0)
    config = GenerationConfig(guidance_scale=3.0, generation_mode="image", max_new_tokens=5)
    before = copy.deepcopy(config.to_dict())
    assert torch.equal(new_ids(model, inputs, generation_config=config), expected)
    assert torch.equal(model.generate(inputs["input_ids"], config)[:, -IMAGE_LENGTH:], expected)
    assert config.to_dict() == before
    defaults = small_model()
    defaults.generation_config.update(guidance_scale=3.0, max_new_tokens=5)
    assert torch.equal(new_ids(defaults, inputs, generation_mode="image"), expected)
    assert new_ids(defaults, inputs).shape == (2, 5)  # nothing to guide text away from
    assert not torch.equal(new_ids(defaults, inputs, generation_mode="image", guidance_scale=1.0), expected)


def test_text_can_go_on_from_a_cache(model, inputs):
    first = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    rest = model.generate(
        first.sequences,
        attention_mask=mask,
        cache=first.cache,
        max_new_tokens=4,
        eos_token_id=-1,
    )
    assert torch.equal(rest, model.generate(**inputs, max_new_tokens=8, eos_token_id=-1))


def test_bfloat16_draws_whole_images(model, inputs):
    half = copy.deepcopy(model).bfloat16()
    assert_images(new_ids(half, inputs, generation_mode="image", guidance_scale=3.0, do_sample=True), 2)


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(300, TEXT_SIZE, (1, length), generator=torch.Generator().manual_seed(0))


def test_text_without_limits_goes_on_to_the_last_position(model):
    for length in (1, 40, POSITIONS - 1):
        assert model.generate(prompt_of(length), eos_token_id=-1).shape == (1, POSITIONS)
    assert model.generate(prompt_of(90), max_new_tokens=30, eos_token_id=-1).shape == (1, POSITIONS)
    assert model.generate(prompt_of(10), max_length=500, eos_token_id=-1).shape == (1, POSITIONS)
    assert model.generate(prompt_of(10), max_length=30, eos_token_id=-1).shape == (1, 30)
    assert (
        model.generate(prompt_of(10), eos_token_id=-1, generation_config=GenerationConfig(max_length=30)).shape[1] == 30
    )


def test_prompts_beyond_the_positions_are_refused():
    model, longest = small_model(), POSITIONS - IMAGE_LENGTH - 1  # one more for the <break>
    assert model.generate(prompt_of(longest), generation_mode="image").shape == (1, POSITIONS)
    model.model.forward = None  # nothing may run
    with pytest.raises(ValueError, match=f"at most {POSITIONS - IMAGE_LENGTH} tokens"):
        model.generate(prompt_of(longest + 1), generation_mode="image")
    with pytest.raises(ValueError, match=f"at most {POSITIONS - 1} tokens"):
        model.generate(prompt_of(POSITIONS))
    with pytest.raises(ValueError, match="positions"):  # the negative prompt needs positions as well
        model.generate(
            prompt_of(3), negative_prompt_ids=prompt_of(longest + 1), guidance_scale=2.0, generation_mode="image"
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"generation_mode": "audio"}, "generation_mode among"),
        ({"generation_mode": "image", "guidance_scale": -1.0}, "guidance_scale >= 0"),
        ({"generation_mode": "text", "guidance_scale": -1.0}, "guidance_scale >= 0"),
        ({"generation_mode": "image", "guidance_scale": float("nan")}, "guidance_scale >= 0"),
        ({"generation_mode": "image", "guidance_scale": float("inf")}, "guidance_scale >= 0"),
        ({"generation_mode": "image", "guidance_scale": 2.0, "num_beams": 2}, "greedy search or sampling"),
        (
            {"generation_mode": "image", "guidance_scale": 2.0, "prompt_lookup_num_tokens": 2},
            "greedy search or sampling",
        ),
        ({"generation_mode": "image", "guidance_scale": 2.0, "prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"generation_mode": "image", "a_misspelling": 2}, "a_misspelling"),
        ({"max_length": 3}, "set max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"attention_mask": torch.ones(1, 9)}, "attention mask of shape"),
        ({"attention_mask": torch.zeros(1, 3)}, "row of padding"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_any_work(arguments, message):
    model = small_model()
    model.model.forward = None  # nothing may run
    with pytest.raises(ValueError, match=message):
        model.generate(prompt_of(3), **arguments)


@pytest.mark.parametrize(
    "ids, message",
    [
        (None, "at least one token"),
        ([[1, 2]], "tensor"),
        (torch.tensor([1, 300]), "shape"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.tensor([[1, 632]]), r"ids in \[0, 632\)"),
        (torch.tensor([[1, -1]]), r"ids in \[0, 632\)"),
        (torch.tensor([[1, 300], [0, 0]]), "row of padding"),
    ],
)
def test_ids_that_are_no_prompts_are_refused(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids, generation_mode="image")
