"""Which guidance a call asks for: its arguments, a configuration, the model's defaults; what excludes each other."""

import pytest
import torch
from conftest import draw, small_model
from test_decoding import STRATEGIES, new_ids
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig


def test_the_closest_source_decides_the_strategy(model, processor):
    inputs = processor.for_text_to_image(["a red circle", "blue"])
    draw_with = lambda model, **arguments: new_ids(model, inputs, generation_mode="image", **arguments)  # noqa: E731
    cfg, cdk = (draw_with(model, **STRATEGIES[name]) for name in ("cfg", "cd-k"))
    assert not torch.equal(cfg, cdk)
    defaults = small_model()
    defaults.generation_config.update(**STRATEGIES["cfg"])
    assert torch.equal(draw_with(defaults), cfg)
    assert torch.equal(draw_with(defaults, **STRATEGIES["cd-k"]), cdk)
    passed = GenerationConfig(**STRATEGIES["cd-k"])
    assert torch.equal(draw_with(defaults, generation_config=passed), cdk)
    assert torch.equal(draw_with(defaults, guidance_scale=1.0), draw_with(model))


def test_defaults_of_drawing_leave_text_alone(model, processor):
    inputs = processor.for_image_to_text(draw("red", "circle"))
    defaults = small_model()
    defaults.generation_config.update(guidance_scale=3.0)
    plain = new_ids(model, inputs, max_new_tokens=6)
    assert torch.equal(new_ids(defaults, inputs, max_new_tokens=6), plain)
    passed_on = GenerationConfig(guidance_scale=3.0, max_new_tokens=6)  # as a pipeline does
    assert torch.equal(new_ids(defaults, inputs, generation_config=passed_on), plain)


@pytest.mark.parametrize("strategy", ["cfg", "cd-k"])
def test_arguments_of_the_call_guide_text_also_where_they_are_the_defaults(model, processor, strategy):
    inputs = processor.for_image_to_text(draw("red", "circle"))
    defaults, arguments = small_model(), {"max_new_tokens": 8, "eos_token_id": -1}
    defaults.generation_config.update(**STRATEGIES["cfg"])
    guided = new_ids(model, inputs, **STRATEGIES[strategy], **arguments)
    assert torch.equal(new_ids(defaults, inputs, **STRATEGIES[strategy], **arguments), guided)
    assert not torch.equal(new_ids(defaults, inputs, **arguments), guided)
    with pytest.raises(ValueError, match="image in each prompt"):
        defaults.generate(**processor(text="a red circle"), **STRATEGIES["cfg"])


@pytest.mark.parametrize("arguments", [{"guidance_scale": 3.0}, {"contrastive_k": 2}, {"image_guidance_scale": 1.5}])
@pytest.mark.parametrize("mode", ["image", "text"])
def test_continuous_batching_refuses_guidance_that_the_call_asks_for(arguments, mode):
    defaults = small_model()
    defaults.generation_config.update(guidance_scale=3.0)
    defaults.model.forward = None  # nothing may run
    with pytest.raises(ValueError, match="no guidance in continuous batching"):
        defaults.generate_batch([[1, 300]], generation_mode=mode, warmup=False, **arguments)


def test_continuous_batching_draws_unguided_where_the_call_says_so():
    defaults = small_model()
    defaults.generation_config.update(guidance_scale=3.0, eos_token_id=1)
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = defaults.generate_batch(
        [[1, 300, 2]], generation_mode="image", guidance_scale=1.0, continuous_batching_config=pages, warmup=False
    )
    expected = small_model().generate(torch.tensor([[1, 300, 2]]), generation_mode="image")[0, 3:]
    assert [output.generated_tokens for output in outputs.values()] == [expected.tolist()]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"contrastive_alpha": 0.1, "guidance_scale": 3.0}, "leave one out"),
        ({"contrastive_k": 4, "image_guidance_scale": 1.5}, "leave one out"),
        ({"contrastive_alpha": 0}, r"in \(0, 1\]"),
        ({"contrastive_alpha": 1.5}, r"in \(0, 1\]"),
        ({"contrastive_k": 33}, "at most 32"),
        ({"contrastive_k": 633, "generation_mode": "text"}, "at most 632"),
        ({"contrastive_k": 0}, "at least 1"),
        ({"image_guidance_scale": -1.0}, "image_guidance_scale >= 0"),
        ({"image_guidance_scale": 1.5}, "image in each prompt"),
        ({"image_guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 300]])}, "prompts of its own"),
        ({"guidance_scale": 3.0, "generation_mode": "text"}, "image in each prompt"),
        ({"guidance_scale": 3.0, "generation_mode": "interleaved"}, "negative_prompt_ids"),
        ({"image_guidance_scale": 1.5, "generation_mode": "text"}, "negative_prompt_ids"),
        ({"contrastive_alpha": 0.1, "num_beams": 2}, "greedy search or sampling"),
        ({"height": 128, "width": 128}, "one grid it was trained with"),
        ({"image_size": 16}, "no image_size: the model draws the one grid"),
        ({"known_ids": torch.full((1, 17), -1)}, "up to 16"),
        ({"known_ids": torch.full((2, 4), -1)}, "of shape"),
        ({"known_ids": torch.full((1, 4), 300)}, "image ids and -1"),
        ({"known_ids": torch.full((1, 4), -1), "generation_mode": "text"}, "image mode"),
    ],
)
def test_strategies_that_make_no_sense_are_refused_before_any_work(arguments, message):
    model = small_model()
    model.model.forward = None  # nothing may run
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 300, 301, 2]]), **{"generation_mode": "image"} | arguments)
