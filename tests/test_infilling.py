"""Holes: what lies outside a mask stays bit-identical, and what fills a text stands between known words."""

import numpy as np
import pytest
import torch
from conftest import TEXT_SIZE, draw, small_model
from PIL import Image, ImageDraw

from cm3leon_hf.processing_infilling import image_holes, masked_tokens, text_holes

SIZE = 24  # pixels of a picture, whose grid is 4 x 4


def rectangle(box: tuple, size=(SIZE, SIZE)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def strokes() -> Image.Image:
    mask = Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(mask).line((2, 3, 20, 5), fill=1, width=2)
    ImageDraw.Draw(mask).line((4, 20, 5, 13), fill=1, width=2)
    return mask


MASKS = {
    "rectangle": rectangle((7, 7, 16, 16)),
    "strokes": strokes(),
    "corner": rectangle((0, 0, 1, 1)),
    "everything": rectangle((0, 0, SIZE, SIZE)),
    "array": np.array(rectangle((13, 1, 22, 5))) > 0,
}


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0}, {"contrastive_k": 4}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_everything_outside_the_mask_stays_as_it_is(model, processor, vocabulary, name, guidance):
    torch.manual_seed(0)
    picture = draw("red", "circle", SIZE)
    masked = masked_tokens(MASKS[name], picture, processor.image_processor, 4)
    before = processor.encode_images(picture)[0]
    inputs = processor.for_infilling(picture, MASKS[name], "a red circle")
    ids = model.generate(**inputs, generation_mode="image", do_sample=True, num_return_sequences=16, **guidance)
    span = inputs["known_ids"].shape[1]
    assert ids.shape == (16, inputs["input_ids"].shape[1] + span)
    spans = vocabulary.ids_to_codes(ids[:, -span:])
    start = int(masked.nonzero()[0])
    after = before.repeat(16, 1)
    after[:, start : start + span] = spans
    assert torch.equal(after[:, ~masked], before[~masked].repeat(16, 1))
    assert len(after[:, masked].unique(dim=0)) > 1  # what is under it is drawn anew
    drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert all(np.array_equal(one, other) for one, other in zip(drawn, processor.decode_images(after)))


def test_a_mask_covers_every_token_that_it_touches(processor):
    picture = draw("red", "circle", SIZE)
    cover = lambda mask: masked_tokens(mask, picture, processor.image_processor, 4).view(4, 4).int().tolist()  # noqa: E731
    assert cover(rectangle((6, 6, 11, 11))) == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert cover(rectangle((5, 6, 11, 12)))[1][:2] == [1, 1] and cover(rectangle((5, 6, 11, 12)))[2][1] == 1
    wide = Image.new("RGB", (2 * SIZE, SIZE), "white")  # its middle is what the model sees
    assert masked_tokens(rectangle((12, 0, 35, 23), wide.size), wide, processor.image_processor, 4).all()
    with pytest.raises(ValueError, match="part that is seen"):
        masked_tokens(rectangle((0, 0, 10, 23), wide.size), wide, processor.image_processor, 4)


def test_the_prompt_is_the_objectives_document(processor, vocabulary):
    """`<eos> text <break> image with <mask> <infill> span`, as training moves spans."""
    codes = torch.arange(16)[None]
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [5, 9]] = True
    (left,), known = image_holes(codes, masked, vocabulary)
    image = (codes[0] + TEXT_SIZE).tolist()
    assert left == [*image[:5], vocabulary.mask_id, *image[10:], vocabulary.infill_id]
    assert known.tolist() == [[-1, *image[6:9], -1]]
    picture, mask = draw("red", "circle", SIZE), MASKS["rectangle"]
    ids = processor.for_infilling(picture, mask, "a red circle")["input_ids"][0].tolist()
    head = processor(text="a red circle<break>")["input_ids"][0].tolist()
    assert ids[: len(head)] == head and ids.count(vocabulary.mask_id) == 1 and ids[-1] == vocabulary.infill_id
    untold = processor.for_infilling(picture, mask)["input_ids"][0].tolist()
    assert untold[:3] == [vocabulary.eos_id, vocabulary.mask_id, vocabulary.break_id]


@pytest.mark.parametrize("shown", [None, draw("blue", "square")], ids=["text", "text and picture"])
def test_any_number_of_holes_in_a_text(processor, shown):
    torch.manual_seed(0)
    model = small_model()
    text = "a <mask> circle on <mask> and a <mask>"
    inputs = processor.for_infilling(shown, text=text)
    ids = model.generate(**inputs, do_sample=True, num_return_sequences=8, max_new_tokens=44)
    filled = processor.post_process_multimodal_output(ids)
    for row in filled:
        first, rest = row.split(" circle on", 1)
        assert first.startswith("a") and len(first) > 1 and " and a" in rest
    assert len(set(filled)) == 8


def test_one_hole_is_the_plain_infilling_prompt(processor):
    inputs = processor.for_infilling(text="a <mask> circle")
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "<eos>a<mask> circle<infill>"
    assert inputs["text_pieces"] == [[]]
    merged, pieces = text_holes("a <mask> circle on <mask>.", processor.tokenizer)
    assert merged == "a<mask>." and [processor.tokenizer.decode(piece) for piece in pieces] == [" circle on"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask": rectangle((0, 0, 3, 3), (10, 10))}, "picture's size"),
        ({"mask": Image.new("L", (SIZE, SIZE))}, "nothing white"),
        ({"mask": np.zeros((SIZE, SIZE))}, "nothing white"),
        ({"mask": MASKS["corner"], "image": None}, "picture for the mask"),
        ({"mask": MASKS["corner"], "text": "a <mask> circle"}, "both holes"),
        ({"text": "no hole"}, "<mask> for each hole"),
        ({}, "<mask> for each hole"),
        ({"text": "two <mask> <mask> holes"}, "words between two holes"),
    ],
)
def test_holes_that_make_no_sense_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor.for_infilling(**{"image": draw("red", "circle", SIZE)} | arguments)


@pytest.mark.parametrize(
    "control, words", [("canny", "canny edge features"), ("depth", "depth features"), ("scribble", "scribbles")]
)
def test_prompts_from_a_control_image(model, processor, control, words):
    inputs = processor.for_image_to_image(draw("red", "square"), control, "a red square")
    text = processor.post_process_multimodal_output(inputs["input_ids"], skip_special_tokens=False)[0]
    assert text.startswith("<eos>Make high quality image from") and words in text
    assert text.endswith("<break><break>a red square<break>")
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=3.0)
    assert (ids[:, -16:] >= TEXT_SIZE).all()
    with pytest.raises(ValueError, match="control among"):
        processor.for_image_to_image(draw("red", "square"), "smell", "a red square")
    with pytest.raises(ValueError, match="not empty"):
        processor.for_editing(draw("red", "square"), " ")


def test_prompts_with_boxes(model, processor):
    inputs = processor.for_boxes("a dog by a cat", [("a dog", (0, 0.5, 0.5, 1)), ("a cat", (0.25, 0, 1, 0.999))])
    text = processor.post_process_multimodal_output(inputs["input_ids"], skip_special_tokens=False)[0]
    places = "a dog at <loc_0><loc_128><loc_128><loc_255>, a cat at <loc_64><loc_0><loc_255><loc_255>"
    assert text == f"<eos>Generate high quality image of a dog by a cat with segmentations {places}<break>"
    shorter = processor.for_boxes("a", [("a", (0, 0, 1, 1))])
    assert (model.generate(**shorter, generation_mode="image")[:, -16:] >= TEXT_SIZE).all()


@pytest.mark.parametrize(
    "text, objects, message",
    [
        ("", [("a dog", (0, 0, 1, 1))], "a text and named objects"),
        ("a dog", [], "a text and named objects"),
        ("a dog", [("a dog", (0.5, 0, 0.5, 1))], "expected a box x0, y0, x1, y1 in .* for a dog"),
        ("a dog", [("a dog", (0, 0, 96, 96))], "expected a box x0, y0, x1, y1 in .* for a dog"),
        ("a dog", [("a dog", (0, 0, 1))], "expected a box x0, y0, x1, y1 in .* for a dog"),
    ],
)
def test_boxes_that_are_none_are_refused(processor, text, objects, message):
    with pytest.raises(ValueError, match=message):
        processor.for_boxes(text, objects)
