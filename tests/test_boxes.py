"""Boxes: coordinates of the square that the model sees, as ids."""

import numpy as np
import pytest
from PIL import Image

from cm3leon_hf.data.boxes import square_box
from cm3leon_hf.processing_prompts import object_at


def test_boxes_are_those_of_the_square_that_the_image_processor_cuts_out(processor):
    for size in ((40, 24), (24, 40), (32, 32)):
        for box in ((4, 2, 20, 22), (0, 0, *size), (size[0] - 14, size[1] - 14, *size)):
            drawn = np.zeros((size[1], size[0], 3), np.uint8)
            drawn[box[1] : box[3], box[0] : box[2]] = 255
            pixels = processor.image_processor(Image.fromarray(drawn), return_tensors="np")["pixel_values"][0]
            place = np.argwhere(pixels.mean(0) > 0)
            shown = np.concatenate([place.min(0)[::-1], place.max(0)[::-1] + 1]) / 16
            np.testing.assert_allclose(square_box(box, *size), shown, atol=1.01 / 16)
    assert square_box((0, 0, 5, 24), 40, 24) is None
    with pytest.raises(ValueError, match=r"a box x0, y0, x1, y1 in a picture of 40×24, got \[0.0, 0.0, 44.0, 8.0\]"):
        square_box((0, 0, 44, 8), 40, 24)


def test_locations_are_256_bins(vocabulary):
    assert object_at(" a dog", (0, 0.4999, 0.5, 1), vocabulary) == "a dog at <loc_0><loc_127><loc_128><loc_255>"
