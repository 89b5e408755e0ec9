"""The shipped model does what the README and its card say."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

import cm3leon_hf
from cm3leon_hf.processing_prompts import EDITING
from cm3leon_hf.retrieval.memory_bank import MemoryBank

ROOT = Path(__file__).parents[1]
STYLES = ["fluent 3d", "fluent flat", "noto", "twemoji"]
CARD = ROOT / "model_cards" / "cm3leon-emoji"


@pytest.fixture(scope="module")
def path() -> str:
    return cm3leon_hf.default_model()


def drawn_apple(size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((size // 6, size // 4, size * 5 // 6, size * 11 // 12), fill=(220, 40, 50))
    pen.line((size // 2, size // 4, size * 7 // 12, size // 12), fill=(110, 70, 40), width=size // 24)
    return image


def test_shipped_tokenizers_keep_text_and_pictures():
    processor = AutoProcessor.from_pretrained(CARD)
    text = "waving hand with medium-dark skin tone, fluent 3d style"
    ids = processor.for_text_to_image(text)["input_ids"]
    assert processor.post_process_multimodal_output(ids) == [text]
    picture = drawn_apple(96)
    codes = processor.encode_images(picture)
    assert codes.shape == (1, 144)
    (seen,) = processor.decode_images(codes)
    error = (np.asarray(seen, dtype=float) - np.asarray(picture, dtype=float)) / 255
    assert 10 * np.log10(1 / np.square(error).mean()) > 20


def test_readme_python_runs_as_printed(path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {}
    exec(code, names)
    assert names["apple"].size == names["rocket"].size == names["picture"].size == (96, 96)


def test_readme_tree_names_every_module():
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "cm3leon_hf"
    missing = [p.name for p in package.rglob("*.py") if p.name != "__init__.py" and p.name not in tree]
    assert not missing


def test_readme_commands_name_existing_files():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md"))
    paths = re.findall(r"recipes/[\w/]+\.(?:py|yaml)", text)
    assert paths and all((ROOT / path).is_file() for path in paths)


def test_pipeline_draws_and_describes(path):
    pipe = pipeline("any-to-any", model=path)
    torch.manual_seed(0)
    drawn = pipe("red apple, fluent 3d style", generation_mode="image")[0]["generated_image"]
    assert isinstance(drawn, Image.Image) and drawn.size == (96, 96)
    picture = {"images": drawn, "text": "Describe the given picture."}
    (record,) = pipe(picture, return_full_text=False, generate_kwargs={"do_sample": False})
    assert any(style in record["generated_text"] for style in STYLES)


def test_it_knows_a_trained_picture_when_it_sees_one(path):
    """Greedy captions of what it draws name the style it was asked for, far above the chance of one in four."""
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    torch.manual_seed(0)
    asked = [style for style in STYLES for _ in range(6)]
    ids = model.generate(
        **processor.for_text_to_image([f"red apple, {style} style" for style in asked]),
        generation_mode="image",
        guidance_scale=3.0,
    )
    images = processor.post_process_multimodal_output(ids, generation_mode="image")
    inputs = processor.for_image_to_text(images)
    ids = model.generate(**inputs, generation_mode="text", do_sample=False)
    texts = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])
    assert sum(style in text for style, text in zip(asked, texts)) >= 3 / 4 * len(asked)


def test_the_tuned_one_edits_only_what_it_is_told():
    path, bank = cm3leon_hf.default_tuned_model(), MemoryBank.load(cm3leon_hf.default_bank())
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    codes = torch.tensor([document["codes"] for document in bank.fetch([0, 4000, 8000, 12000])])
    prompts = {text: EDITING.format(text=text) for text in ("change nothing", "make it twemoji style")}
    kept = {}
    for text, prompt in prompts.items():
        inputs = processor(text=[prompt] * len(codes), image_codes=codes)
        ids = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, do_sample=False)
        same = processor.vocabulary.ids_to_codes(ids[:, -codes.shape[1] :]) == codes
        kept[text] = same.float().mean()
    assert kept["change nothing"] > 0.95 > 0.7 > kept["make it twemoji style"]


def test_its_weights_fit_the_card(path):
    files = [file for file in Path(path).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 48e6
    assert max(file.stat().st_size for file in files) <= 16e6
    model = AutoModelForCausalLM.from_pretrained(path)
    assert 10e6 <= model.num_parameters() <= 25e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_a_mismatched_vqgan_is_refused(path, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(path, copy)
    config = copy / "processor_config.json"
    config.write_text(re.sub(r'"image_vocab_size": \d+', '"image_vocab_size": 99', config.read_text()))
    with pytest.raises(ValueError, match="expected a VQGAN with 99 codes"):
        AutoProcessor.from_pretrained(copy)
