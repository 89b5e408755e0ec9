"""The shipped model does what the README and its card say."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline
from typer.testing import CliRunner

import cm3leon_hf
from cm3leon_hf.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def path() -> str:
    return cm3leon_hf.default_model()


def test_readme_python_runs_as_printed():
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
    drawn = pipe("red apple, fluent 3d style", generation_mode="image")[0]["generated_image"]
    assert isinstance(drawn, Image.Image) and drawn.size == (96, 96)
    (record,) = pipe({"images": drawn, "text": "Describe the given picture."}, return_full_text=False)
    assert "style" in record["generated_text"]


def test_it_knows_a_trained_picture_when_it_sees_one(path):
    """Greedy captions of what it draws name the style it was asked for, far above the chance of one in four."""
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    styles = ["fluent 3d", "fluent flat", "noto", "twemoji"]
    torch.manual_seed(0)
    ids = model.generate(
        **processor.for_text_to_image([f"red apple, {style} style" for style in styles]),
        generation_mode="image",
        guidance_scale=3.0,
    )
    images = processor.post_process_multimodal_output(ids, generation_mode="image")
    inputs = processor.for_image_to_text(images)
    ids = model.generate(**inputs, generation_mode="text", do_sample=False)
    texts = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])
    assert sum(style in text for style, text in zip(styles, texts)) >= 3


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


def test_command_line_draws_the_same_pictures_for_the_same_seed(tmp_path):
    arguments = ["generate", "red apple, noto style", "cat face", "--num-images", "2", "--seed", "7", "--out"]
    outputs = []
    for name in ("first", "second"):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        outputs.append([Image.open(tmp_path / name / f"{index:02d}.png").tobytes() for index in range(4)])
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 4
    assert f"{tmp_path / 'second' / 'grid.png'}" in result.output.replace("\n", "")
    assert Image.open(tmp_path / "first" / "grid.png").width > 2 * 96


def test_command_line_describes(tmp_path):
    Image.new("RGBA", (300, 200), (200, 30, 30, 128)).save(tmp_path / "red.png")
    result = CliRunner().invoke(app, ["describe", str(tmp_path / "red.png"), "--max-new-tokens", "8"])
    assert result.exit_code == 0 and result.output.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", " "], "expected prompts that are not empty"),
        (["generate", "apple", "--model", "no/such/folder"], "error: "),
        (["describe", "no-such-file.png"], "which is no file"),
        (["generate", "very " * 600], "expected a prompt of at most"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["generate"], ["describe"]])
def test_help_teaches(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "cm3leon" in result.output.lower()
