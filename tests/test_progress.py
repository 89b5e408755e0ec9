"""Streamers: what they show is what was generated."""

import numpy as np
import pytest
import torch

from cm3leon_hf.progress import PicturePreview


@pytest.mark.parametrize("every, times", [(None, 4), (5, 4), (16, 1)])
def test_previews_grow_into_the_pictures(model, processor, every, times):
    shown = []
    torch.manual_seed(0)
    ids = model.generate(
        **processor.for_text_to_image(["a red circle", "blue"]),
        generation_mode="image",
        do_sample=True,
        guidance_scale=2.0,
        streamer=PicturePreview(processor, shown.append, every),
    )
    assert len(shown) == times and all(len(pictures) == 2 for pictures in shown)
    final = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert all(np.array_equal(one, other) for one, other in zip(shown[-1], final))
    if times > 1:
        codes = processor.vocabulary.ids_to_codes(ids[:, -16:])
        codes[:, every or 4 :] = PicturePreview(processor, print).white[:, every or 4 :]
        assert all(np.array_equal(one, other) for one, other in zip(shown[0], processor.decode_images(codes)))


def test_previews_need_a_pace(processor):
    with pytest.raises(ValueError, match="every 1 token or more"):
        PicturePreview(processor, print, every=0)
