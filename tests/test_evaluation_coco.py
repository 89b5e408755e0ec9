"""The recipe on MS-COCO from end to end on drawn pictures, under an Inception of random weights; killed and resumed."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from conftest import CAPTIONS, COLOURS, REPOSITORY, SHAPES, draw, load_recipe
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pytorch_fid.fid_score import get_activations
from pytorch_fid.inception import InceptionV3
from test_evaluation_recipes import encoded

PICTURES = [draw(colour, shape) for colour in COLOURS for shape in SHAPES]
SCRIPT = str(REPOSITORY / "recipes/evaluate/coco.py")
KILLED_IN_ITS_THIRD_BATCH = """
import os, runpy, signal, sys
from cm3leon_hf import CM3LeonForCausalLM
generate, calls = CM3LeonForCausalLM.generate, []
def dying(*arguments, **options):
    calls.append(1)
    if len(calls) == 2 * 2 + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*arguments, **options)
CM3LeonForCausalLM.generate = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
def test_the_recipe_evaluates(coco_arguments, tmp_path, capsys):
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


def frechet_of_few(one: np.ndarray, other: np.ndarray) -> float:
    """The distance of fewer pictures than dimensions, from their inner products alone."""
    sides = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one.astype(np.float64), other.astype(np.float64))]
    shift = one.mean(0, np.float64) - other.mean(0, np.float64)
    overlap = np.linalg.svd(sides[0] @ sides[1].T, compute_uv=False).sum()
    return shift @ shift + sum((side**2).sum() for side in sides) - 2 * overlap


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_a_killed_evaluation_goes_on_and_its_fid_is_pytorch_fids(
    coco_arguments, small_bank, inception_weights, tmp_path, capsys, monkeypatch
):
    recipe, arguments = coco_arguments
    settings = [{"name": "table-1", "strategy": "both", "candidates": 2, "documents": 1}]
    arguments = replace(arguments, settings=settings, bank=small_bank, features="inception", resamples=1)
    (tmp_path / "coco.yaml").write_text(yaml.safe_dump(asdict(arguments)))
    command = [sys.executable, "-c", KILLED_IN_ITS_THIRD_BATCH, SCRIPT, "--config", str(tmp_path / "coco.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    folder = tmp_path / "out" / "drawn" / "table-1"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(before) == 8, "of three batches of four, four and two, two stay"

    recipe.main(arguments)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    drawn = sorted(folder.iterdir())
    assert len(drawn) == 10 and all(before.get(file.name, file.read_bytes()) == file.read_bytes() for file in drawn)
    rows = recipe.load_dataset(arguments.dataset, split="train")
    numbers, captions = recipe.drawn_captions(rows, arguments)
    unbroken = recipe.TextToImageEvaluation(
        replace(arguments, out=str(tmp_path / "unbroken")), arguments.model, captions, {}
    )
    unbroken.draw()
    assert [path.read_bytes() for path in unbroken.run.drawn(unbroken.settings[0], 10)] == [
        file.read_bytes() for file in drawn
    ]
    real = [tmp_path / f"real-{place}.png" for place in range(10)]
    for path, number in zip(real, numbers):
        PICTURES[number].save(path)
    features = [get_activations(files, InceptionV3([3]), batch_size=5, num_workers=0) for files in (drawn, real)]
    assert line["table-1"]["fid"]["value"] == pytest.approx(frechet_of_few(*features), rel=1e-5)
    protocol = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["protocol"]
    assert "pytorch-fid Inception, bilinear without antialiasing" in protocol["features"]
    assert "8 documents" in protocol["bank"] and protocol["captions"] == 10


def test_damaged_pictures_stop_the_measuring(coco_arguments, tmp_path):
    recipe, arguments = coco_arguments
    evaluation = recipe.TextToImageEvaluation(arguments, arguments.model, CAPTIONS, {})
    folder = tmp_path / "out" / "drawn" / "one"
    folder.mkdir(parents=True)
    for row, picture in enumerate(PICTURES):
        picture.save(folder / f"{row:06d}.png")
    judges = evaluation.judges(PICTURES)
    with pytest.warns(UserWarning, match="8 pictures for features of dimension 16"):
        judges.measure_drawn(sorted(folder.iterdir()), CAPTIONS)
    with pytest.raises(ValueError, match="expected pictures for all prompts, got 7 for 8"):
        judges.measure_drawn(sorted(folder.iterdir())[1:], CAPTIONS)
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="picture .*000003.png: "):
        judges.measure_drawn(sorted(folder.iterdir()), CAPTIONS)


def test_empty_captions_are_said(coco_arguments, tmp_path):
    recipe, arguments = coco_arguments
    rows = recipe.load_dataset(arguments.dataset, split="train").to_list()
    rows[5]["sentences"] = ["a red circle", "  "]
    features = Features({"picture": ImageFeature(), "sentences": List(Value("string"))})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "coco" / "train.parquet")
    arguments.count = 16
    with pytest.raises(ValueError, match="got an empty one in row 5"):
        recipe.main(arguments)
    assert not (tmp_path / "out").exists()


def test_too_few_captions_are_said(coco_arguments):
    recipe, arguments = coco_arguments
    arguments.count = 17
    with pytest.raises(ValueError, match="expected 17 captions .* got 16"):
        recipe.main(arguments)
