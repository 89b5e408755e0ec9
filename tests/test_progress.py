"""Streamers: what they show is what was generated."""

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image

from cm3leon_hf.progress import PicturePreview


@pytest.mark.parametrize("way", [{}, {"jacobi_window": 3}, {"num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("every, times", [(None, 4), (5, 4), (16, 1)])
def test_previews_grow_into_the_pictures(model, processor, every, times, way):
    shown = []
    torch.manual_seed(0)
    ids = model.generate(
        **processor.for_text_to_image(["a red circle", "blue"]),
        generation_mode="image",
        do_sample=True,
        guidance_scale=2.0,
        streamer=PicturePreview(processor, shown.append, every),
        **way,
    )
    assert len(shown) == times and all(len(pictures) == len(ids) for pictures in shown)
    final = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert all(np.array_equal(one, other) for one, other in zip(shown[-1], final))
    if times > 1:
        codes = processor.vocabulary.ids_to_codes(ids[:, -16:])
        codes[:, every or 4 :] = PicturePreview(processor, print).white[:, every or 4 :]
        assert all(np.array_equal(one, other) for one, other in zip(shown[0], processor.decode_images(codes)))


def test_previews_of_a_hole_show_the_picture_around_it(model, processor):
    picture, mask, shown = draw("red", "circle"), Image.new("L", (16, 16)), []
    mask.paste(255, (4, 4, 12, 8))  # two tokens of the second row
    inputs = processor.for_infilling(picture, mask, "a red circle")
    torch.manual_seed(0)
    preview = PicturePreview(processor, shown.append, every=1)
    ids = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=2.0, streamer=preview)
    final = processor.post_process_multimodal_output(ids, generation_mode="image")[0]
    codes = processor.encode_images(picture)
    codes[0, 5:7] = processor.vocabulary.ids_to_codes(ids[0, -2:])
    codes[0, 6] = preview.white[0, 6]
    assert [pictures[0].tobytes() for pictures in shown] == [
        processor.decode_images(codes)[0].tobytes(),
        final.tobytes(),
    ]


def test_previews_need_a_pace(processor):
    with pytest.raises(ValueError, match="every 1 token or more"):
        PicturePreview(processor, print, every=0)
