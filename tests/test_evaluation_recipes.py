"""The text-to-image recipes from end to end on a tiny model and tiny data."""

import io
import json

import pytest
from conftest import CAPTIONS, COLOURS, REPOSITORY, SHAPES, draw, load_recipe
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from trl import TrlParser

from cm3leon_hf.evaluation.captions import caption_scores
from cm3leon_hf.evaluation.files import readable_rows
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.evaluation.settings import read_settings

PICTURES = [draw(colour, shape) for colour in COLOURS for shape in SHAPES]


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def emoji_arguments(folder, small_clip, tmp_path):
    rows = [
        {"image": draw(colour, shape, 24), "captions": [f"a {colour} {shape} on white", f"{colour} {shape}"]}
        for colour in COLOURS
        for shape in SHAPES
    ]
    (tmp_path / "emoji").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "emoji" / "heldout_pairs-00000-of-00001.parquet")
    settings = [
        {"name": "cfg-1", "guidance_scale": 1.0},
        {"name": "cfg-3", "guidance_scale": 3.0, "text": {"guidance_scale": 3.0}},
        {"name": "documents", "documents": 1},
    ]
    recipe = load_recipe("evaluate/emoji.py")
    places = {"dataset": str(tmp_path / "emoji"), "out": str(tmp_path / "out"), "model": folder}
    options = {"clip_model": small_clip, "split": "train", "batch_size": 3, "resamples": 20}
    return recipe, recipe.EmojiArguments(settings=settings, **places, **options)


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_the_emoji_recipe_evaluates(emoji_arguments, tmp_path, capsys):
    recipe, arguments = emoji_arguments
    recipe.main(arguments)
    printed = capsys.readouterr().out
    assert "left out without a memory bank: documents" in printed
    line = json.loads(printed.strip().splitlines()[-1])
    assert set(line) == {"cfg-1", "cfg-3", "real"}
    assert set(line["cfg-3"]) == {"fd", "precision", "recall", "clip_score", "r_at_1", "cider"}
    for row in line.values():
        assert all(one["low"] <= one["value"] <= one["high"] for one in row.values())
    written = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    plots = {"results.png", "guidance.png"}
    assert written == plots | {"plan.json", "results.json", "results.md", "model_index.yml", "replicates.safetensors"}
    assert Image.open(tmp_path / "out" / "results.png").width > 500
    texts = Run(tmp_path / "out").described("guidance_scale-3.0_documents-0", 8)
    rows = recipe.held_out_rows(arguments)
    expected = caption_scores(texts, rows["captions"][:], ("cider",), "words")["cider"].corpus
    assert line["cfg-3"]["cider"]["value"] == pytest.approx(expected)
    recipe.main(arguments)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == line


@pytest.fixture
def coco_arguments(folder, small_clip, tmp_path):
    images = [{"bytes": encoded(picture), "path": f"{row}.png"} for row, picture in enumerate(PICTURES)]
    captions = [[text, f"there is {text} "] for text in CAPTIONS]
    features = Features({"picture": ImageFeature(), "sentences": List(Value("string"))})
    (tmp_path / "coco").mkdir()
    rows = Dataset.from_dict({"picture": images, "sentences": captions}, features)
    rows.to_parquet(tmp_path / "coco" / "train.parquet")
    settings = [
        {"name": "one", "strategy": "cfg"},
        {"name": "two", "strategy": "cfg", "candidates": 2},
        {"name": "both", "strategy": "both", "candidates": 2},
    ]
    recipe = load_recipe("evaluate/coco.py")
    places = {"dataset": str(tmp_path / "coco"), "out": str(tmp_path / "out"), "model": folder, "split": "train"}
    columns = {"image_column": "picture", "caption_column": "sentences", "precision_recall": False}
    options = {"clip_model": small_clip, "count": 10, "batch_size": 4, "resamples": 10}
    return recipe, recipe.CocoArguments(settings=settings, **places, **columns, **options)


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_the_coco_recipe_evaluates(coco_arguments, tmp_path, capsys):
    recipe, arguments = coco_arguments
    recipe.main(arguments)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(line) == {"one", "two", "both", "real"}
    assert set(line["both"]) == {"fid", "clip_score", "r_at_1"}
    assert (tmp_path / "out" / "candidates.png").exists() and not (tmp_path / "out" / "guidance.png").exists()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["settings"]["two"]["clip"] and "clip" not in plan["settings"]["one"]
    assert len(set(plan["prompts"])) == 10 and not any(prompt.endswith(" ") for prompt in plan["prompts"])
    numbers, captions = recipe.drawn_captions(recipe.load_dataset(arguments.dataset, split="train"), arguments)
    assert captions == plan["prompts"]
    assert all(CAPTIONS[row] in caption for row, caption in zip(numbers, captions))
    arguments.seed = 1
    assert recipe.drawn_captions(recipe.load_dataset(arguments.dataset, split="train"), arguments)[1] != captions


@pytest.mark.parametrize("name, kind", [("emoji", "EmojiArguments"), ("coco", "CocoArguments")])
def test_the_recipes_settings_are_read(name, kind):
    parser = TrlParser(getattr(load_recipe(f"evaluate/{name}.py"), kind))
    (arguments,) = parser.parse_args_and_config(["--config", str(REPOSITORY / f"recipes/evaluate/{name}.yaml")])
    settings = read_settings(arguments.settings)
    assert {setting.documents for setting in settings} == {0, 1, 2}
    assert len({json.dumps(setting.arguments) + str(setting.strategy) for setting in settings}) > 3


def test_too_few_captions_are_said(coco_arguments):
    recipe, arguments = coco_arguments
    arguments.count = 17
    with pytest.raises(ValueError, match="expected 17 captions .* got 16"):
        recipe.main(arguments)


def test_broken_pictures_stop_a_run_or_are_skipped(tmp_path, capsys):
    cells = [{"bytes": encoded(PICTURES[0]), "path": None}, {"bytes": encoded(PICTURES[1])[:60], "path": "two.png"}]
    rows = Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match=r"picture two.png: .*skip broken"):
        readable_rows(rows, "image")
    assert len(readable_rows(rows, "image", skip_broken=True)) == 1
    assert "skipped picture two.png" in capsys.readouterr().out
