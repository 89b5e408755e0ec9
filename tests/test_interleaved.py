"""Interleaved mode: text and whole images, guided or not."""

import pytest
import torch
from conftest import TEXT_SIZE, small_model
from test_decoding import IMAGE_LENGTH, STRATEGIES, new_ids


def test_interleaved_rows_are_text_and_whole_images(model, processor):
    torch.manual_seed(0)
    model = small_model()
    with torch.no_grad():  # makes a change of modality likely
        model.lm_head.weight[2] *= 3
    inputs = processor(text=["a red", "circle"])
    ids = model.generate(
        **inputs, generation_mode="interleaved", do_sample=True, num_return_sequences=6, max_new_tokens=60
    )
    rows = processor.post_process_multimodal_output(ids, generation_mode="interleaved")
    pictures = 0
    for row, parts in zip(ids, rows):
        images = [part for part in parts if not isinstance(part, str)]
        assert int((row >= TEXT_SIZE).sum()) == IMAGE_LENGTH * len(images)  # no token of an image is over
        assert all(image.size == (16, 16) for image in images)
        pictures += len(images)
    assert pictures > 2 and all(row[0].startswith(("a red", "circle")) for row in rows)


def test_an_open_image_is_finished_in_interleaved_mode(model, processor):
    inputs = processor.for_text_to_image("a red circle")
    ids = new_ids(model, inputs, generation_mode="interleaved", max_new_tokens=IMAGE_LENGTH)
    assert (ids >= TEXT_SIZE).all() and ids.shape[1] == IMAGE_LENGTH
    with pytest.raises(ValueError, match="16 image tokens"):
        model.generate(**inputs, generation_mode="interleaved", max_new_tokens=IMAGE_LENGTH - 1)


@pytest.mark.parametrize("strategy", ["cfg", "cd-k"])
def test_interleaved_rows_are_guided_away_from_negative_prompts(processor, strategy):
    """The branch is continued with the row's own tokens, so that both are in the same place of the grammar."""
    model = small_model()
    with torch.no_grad():  # makes a change of modality likely
        model.lm_head.weight[2] *= 3
    inputs, negative = processor(text=["a red", "circle"]), processor(text="a blue square on white")["input_ids"]
    arguments = {"generation_mode": "interleaved", "max_new_tokens": 50, **STRATEGIES[strategy]}
    guided = new_ids(model, inputs, negative_prompt_ids=negative, **arguments)
    assert torch.equal(new_ids(model, inputs, negative_prompt_ids=negative, use_cache=False, **arguments), guided)
    assert not torch.equal(new_ids(model, inputs, generation_mode="interleaved", max_new_tokens=50), guided)
    images = (guided >= TEXT_SIZE).sum(1)
    assert (images % IMAGE_LENGTH == 0).all() and images.sum() > 0
