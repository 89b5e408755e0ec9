"""Prompts in the paper's layout, real image ids, saving, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from conftest import GRID_SIZE, IMAGE_SIZE, TEXT_SIZE, small_vqgan
from PIL import Image
from transformers import AutoProcessor

import cm3leon_hf.processing_cm3leon as processing
from cm3leon_hf import CM3LeonProcessor

LENGTH = GRID_SIZE**2


@pytest.fixture(scope="module")
def codes(processor, pictures) -> torch.Tensor:
    return processor.encode_images(pictures)


@pytest.fixture(scope="module")
def layout(processor, vocabulary):
    """`<eos>`, then a list of texts and rows of codes, as ids."""

    def ids(*parts) -> list[int]:
        row = [vocabulary.eos_id]
        for part in parts:
            if isinstance(part, str):
                row += processor.tokenizer(part, add_special_tokens=False)["input_ids"]
            else:
                row += (part + TEXT_SIZE).tolist()
        return row

    return ids


def rows(batch) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(batch["input_ids"], batch["attention_mask"])]


def test_text_to_image_prompts(processor, layout, vocabulary):
    batch = processor.for_text_to_image(["a red circle on white", "blue"])
    assert rows(batch) == [layout("a red circle on white", "<break>"), layout("blue", "<break>")]
    assert batch["input_ids"][1, 0] == vocabulary.pad_id  # padding on the left
    assert rows(processor.for_text_to_image("blue")) == rows(batch)[1:]


def test_image_to_text_prompts(processor, layout, pictures, codes):
    expected = [layout("Describe.<mask><break>", code, "<infill>") for code in codes[:2]]
    assert rows(processor.for_image_to_text(pictures[:2], "Describe.")) == expected
    assert rows(processor(images=pictures[:2], text=["Describe."] * 2)) == expected
    assert rows(processor.for_image_to_text(image_codes=codes[:2], text="Describe.")) == expected
    bare = [layout("<mask><break>", codes[0], "<infill>")]
    assert rows(processor.for_image_to_text(pictures[0])) == rows(processor(images=pictures[0])) == bare


def test_retrieved_documents_stand_in_front_the_best_last(processor, layout, pictures, codes, caplog):
    best = {"text": "a red circle", "codes": codes[0].tolist(), "image": None}
    second, third = {"image": pictures[1]}, {"text": "words alone"}
    prompts, found = ["red", "a blue square"], [[best, second, third], []]
    expected = [
        layout("words alone")
        + layout("<break>", codes[1])
        + layout("a red circle<break>", codes[0])
        + layout("red", "<break>"),
        layout("a blue square", "<break>"),
    ]
    assert rows(processor.for_text_to_image(prompts, found)) == expected
    texts = [f"{prompt}<break>" for prompt in prompts]
    assert rows(processor(text=texts, retrieved=found)) == expected
    assert processor(text=texts, retrieved=found, padding=False, return_tensors=None)["input_ids"] == expected
    room = len(expected[0]) + LENGTH - 1  # one position too few
    assert rows(processor.for_text_to_image(prompts, found, max_length=room)) == [
        expected[0][len(layout("words alone")) :],
        expected[1],
    ]
    assert "dropped 1 of 3 retrieved documents" in caplog.text
    with pytest.raises(ValueError, match="each of 2 prompts, got 1"):
        processor.for_text_to_image(prompts, found[:1])
    with pytest.raises(ValueError, match="a text or a picture, got neither"):
        processor.for_text_to_image("red", [[{"text": None, "codes": None}]])


def test_images_stand_where_the_text_wants_them(processor, layout, pictures, codes):
    text = ["first<break><image><eos>second<break><image>", "third<break><image>"]
    batch = processor(images=[pictures[:2], [pictures[2]]], text=text)
    first = layout("first<break>", codes[0], "<eos>second<break>", codes[1])
    assert rows(batch) == [first, layout("third<break>", codes[2])]


def test_codes_in_place_of_images(processor, pictures, codes):
    expected = processor(images=pictures[:2], text=["<image>"] * 2)["input_ids"]
    for given in (codes[:2], codes[:2].tolist(), codes[:2].numpy(), codes[:2].int()):
        assert torch.equal(processor(image_codes=given, text=["<image>"] * 2)["input_ids"], expected)


def test_the_placeholder_never_reaches_the_model(processor, pictures, vocabulary):
    ids = processor(images=pictures[:2], text="<image> and <image>")["input_ids"]
    assert vocabulary.image_id not in ids
    assert vocabulary.is_image(ids).sum() == 2 * LENGTH


def test_pictures_are_scaled_cropped_and_mapped_to_the_unit_range(processor, vqgan):
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 48, 32))  # a white square in the middle
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[..., 1:-1].min() > 0.9 and pixels.max() <= 1
    black = processor.image_processor([Image.new("RGB", (9, 9))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(black, -torch.ones_like(black))


def test_different_pictures_have_different_codes(codes):
    assert len(codes.unique(dim=0)) == len(codes)


def test_ids_become_the_pictures_that_the_vqgan_draws(processor, vqgan, layout):
    codes = torch.arange(2 * LENGTH).view(2, LENGTH) % IMAGE_SIZE
    ids = torch.tensor([layout("a<break>", row) for row in codes])
    images = processor.post_process_multimodal_output(ids, generation_mode="image")
    expected = ((vqgan.decode(codes) + 1) * 127.5).round().permute(0, 2, 3, 1)
    for image, pixels in zip(images, expected):
        assert (image.mode, image.size) == ("RGB", (16, 16))
        assert np.array_equal(np.asarray(image), pixels.numpy())


def test_ids_become_text_without_images(processor, layout, codes):
    ids = torch.tensor([layout("a red<break>", codes[0])])
    assert processor.post_process_multimodal_output(ids) == ["a red"]
    assert processor.post_process_multimodal_output(ids[0], generation_mode="text") == ["a red"]
    assert processor.post_process_multimodal_output(ids, skip_special_tokens=False) == ["<eos>a red<break>"]


@pytest.mark.parametrize("text", ["a red circle", "naïve 🍎 \t\n\0 ©", "UPPER  spaces "])
def test_any_text_comes_back(processor, text):
    ids = processor(text=text)["input_ids"]
    assert processor.post_process_multimodal_output(ids) == [text]


def test_lists_and_no_padding(processor, layout):
    batch = processor(text=["a", "a red"], padding=False, return_tensors=None)
    assert batch["input_ids"] == [layout("a"), layout("a red")]
    assert processor(text="<eos>a")["input_ids"].tolist() == [layout("a")]
    assert processor(text="a", add_special_tokens=False)["input_ids"].tolist() == [layout("a")[1:]]


def test_an_empty_text_beside_an_image(processor, layout, codes):
    assert rows(processor(image_codes=codes[:1], text=["<image>", ""])) == [layout(codes[0]), layout()]


def test_the_chat_template_writes_the_same_prompts(processor, layout, pictures, codes):
    question = {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What?"}]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert rows(processor.apply_chat_template([question], **options)) == [
        layout("What?<mask><break>", codes[0], "<infill>")
    ]
    drawn = {"role": "assistant", "content": [{"type": "image", "image": pictures[1]}]}
    wish = {"role": "user", "content": "a red circle"}
    assert rows(processor.apply_chat_template([wish, drawn], **options)) == [layout("a red circle<break>", codes[1])]
    answer = {"role": "assistant", "content": [{"type": "text", "text": " a dot"}]}
    assert processor.apply_chat_template([question, answer]).endswith("<image><infill> a dot")


def test_saved_twice_loaded_and_copied_it_stays_the_same(processor, pictures, codes, tmp_path):
    for _ in range(2):
        processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = CM3LeonProcessor.from_pretrained(tmp_path / "again", device="cpu")
    for other in (loaded, again, copy.deepcopy(loaded)):
        assert other.vocabulary == processor.vocabulary
        assert other.chat_template == processor.chat_template
        assert torch.equal(other.encode_images(pictures), codes)
        expected = processor(text=["a", "a red circle"])["input_ids"]
        assert torch.equal(other(text=["a", "a red circle"])["input_ids"], expected)
    assert processor.vqgan is not None


def test_a_push_sends_the_vqgan_too(processor, tmp_path, monkeypatch):
    pushed = []

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "sent")
        pushed.append((repo_id, kwargs))

    monkeypatch.setattr(CM3LeonProcessor, "push_to_hub", push_to_hub)
    processor.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model", private=True)
    assert pushed == [("me/model", {"private": True})]
    assert (tmp_path / "sent" / processing.VQGAN_FOLDER / "model.safetensors").is_file()


def test_the_vqgan_follows_the_device(processor):
    assert processor.to("cpu").vqgan.device == torch.device("cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "not empty"),
        ({"text": ""}, "not empty"),
        ({"text": "  "}, "not empty"),
        ({"text": ["a", ""]}, "not empty"),
        ({"text": []}, "not empty"),
        ({"text": ["a", None]}, "not empty"),
        ({"images": []}, "at least one image"),
        ({"images": [], "text": "a"}, "at least one image"),
        ({"images": "no/such/file.png"}, "no file"),
        ({"text": "a <image>"}, "got 0 for 1"),
        ({"images": [Image.new("RGB", (9, 9))] * 2, "text": "a"}, "got 2 for 1"),
        ({"images": Image.new("RGB", (9, 9)), "text": ["a", "b"]}, "got 1 for 2"),
        ({"image_codes": torch.full((1, LENGTH), IMAGE_SIZE)}, r"codes in \[0, 32\)"),
        ({"image_codes": torch.full((1, LENGTH), -1)}, r"codes in \[0, 32\)"),
        ({"image_codes": torch.zeros(1, 25, dtype=torch.long)}, "grid"),
        ({"image_codes": torch.zeros(LENGTH, dtype=torch.long)}, "grid"),
        ({"text": "a", "videos": ["film.mp4"]}, "videos or audio"),
        ({"text": "a", "audio": np.zeros(9)}, "videos or audio"),
        ({"text": ["a", "a red circle"], "padding": False}, "padding=True"),
    ],
)
def test_what_makes_no_prompt_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_prompts_of_the_wrong_kind_are_refused(processor):
    for prompts in ("", " ", [], ["a", ""], [7]):
        with pytest.raises(ValueError, match="not empty"):
            processor.for_text_to_image(prompts)
    with pytest.raises(ValueError, match="images or their codes"):
        processor.for_image_to_text(text="Describe.")


def test_ids_of_the_wrong_kind_are_refused(processor):
    with pytest.raises(ValueError, match="generation_mode among"):
        processor.post_process_multimodal_output(torch.ones(1, 20, dtype=torch.long), generation_mode="audio")
    for ids in (torch.ones(1, 20, dtype=torch.long), torch.tensor([[1, 600]])):
        with pytest.raises(ValueError, match="generation_mode='image'"):
            processor.post_process_multimodal_output(ids, generation_mode="image")


def rebuilt(processor, **changes) -> CM3LeonProcessor:
    sizes = {"text_vocab_size": TEXT_SIZE, "image_vocab_size": IMAGE_SIZE, "image_grid_size": GRID_SIZE}
    parts = {"tokenizer": processor.tokenizer, "vqgan": processor.vqgan}
    return CM3LeonProcessor(processor.image_processor, **sizes | parts | changes)


def test_without_a_vqgan_codes_still_work(processor, codes):
    plain = rebuilt(processor, vqgan=None)
    assert torch.equal(plain(image_codes=codes)["input_ids"], processor(image_codes=codes)["input_ids"])
    with pytest.raises(ValueError, match="with a VQGAN"):
        plain.decode_images(codes)


@pytest.mark.parametrize("changes", [{"num_embeddings": 64}, {"channel_multiplier": [1, 2]}])
def test_a_vqgan_of_another_vocabulary_is_refused(processor, changes, tmp_path):
    with pytest.raises(ValueError, match="use the VQGAN that this model was trained with"):
        rebuilt(processor, vqgan=small_vqgan(**changes))
    processor.save_pretrained(tmp_path)
    small_vqgan(**changes).save_pretrained(tmp_path / processing.VQGAN_FOLDER)
    with pytest.raises(ValueError, match="use the VQGAN that this model was trained with"):
        AutoProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(processor):
    with pytest.raises(ValueError, match="text_vocab_size"):
        rebuilt(processor, text_vocab_size=400)
    moved = copy.deepcopy(processor.tokenizer)
    state = moved.backend_tokenizer.to_str().replace('"<mask>"', '"<mosk>"')
    moved._tokenizer = type(moved.backend_tokenizer).from_str(state)
    with pytest.raises(ValueError, match="'<mask>'"):
        rebuilt(processor, tokenizer=moved)
