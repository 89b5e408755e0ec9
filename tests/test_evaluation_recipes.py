"""The recipe on emoji from end to end on a tiny model and tiny data, by one process and by two."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml
from conftest import COLOURS, REPOSITORY, SHAPES, draw, load_recipe
from datasets import Dataset, Features
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


def test_a_batch_of_every_setting_of_the_yaml(emoji_arguments, small_bank, tmp_path, capsys):
    recipe, arguments = emoji_arguments
    parser = TrlParser(recipe.EmojiArguments)
    (asked,) = parser.parse_args_and_config(["--config", str(REPOSITORY / "recipes/evaluate/emoji.yaml")])
    arguments.settings, arguments.bank = asked.settings, small_bank
    arguments.count = arguments.batch_size = 4
    with pytest.warns(UserWarning, match="unreliable"):
        recipe.main(arguments)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(line) == [*(one["name"] for one in asked.settings), "real"]
    metrics = {"fd", "precision", "recall", "clip_score", "r_at_1", "cider"}
    assert all(set(row) == metrics for name, row in line.items() if name != "real")
    described = {path.name for path in (tmp_path / "out" / "described").iterdir()}
    assert {"guidance_scale-2.0_documents-0", "guidance_scale-5.0_documents-0", "documents-1"} < described
    assert {path.name for path in (tmp_path / "out" / "drawn").iterdir()} == set(line) - {"real"}
    assert (tmp_path / "out" / "guidance.png").exists()


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_two_processes_find_what_one_finds(emoji_arguments, small_bank, tmp_path, capsys):
    recipe, arguments = emoji_arguments
    arguments = replace(arguments, bank=small_bank)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(asdict(replace(arguments, out=str(tmp_path / "two")))))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # as accelerate does
    script = [str(REPOSITORY / "recipes/evaluate/emoji.py"), "--config", str(tmp_path / "two.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *script]
    shared = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert shared.returncode == 0, shared.stderr[-4000:]
    tables = [line for line in shared.stdout.splitlines() if line.startswith("{")]
    assert len(tables) == 1, "one process reports"
    recipe.main(arguments)
    assert json.loads(tables[0]) == json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for name in ("drawn", "described"):
        alone, both = (
            {file.relative_to(folder): file.read_bytes() for file in folder.glob(f"{name}/*/*")}
            for folder in (tmp_path / "out", tmp_path / "two")
        )
        assert alone == both and len(alone) >= 16


@pytest.mark.parametrize("captions", [[], ["a red circle", " "]])
def test_rows_without_captions_are_said(captions, emoji_arguments, tmp_path):
    recipe, arguments = emoji_arguments
    rows = [{"image": PICTURES[0], "captions": ["a red circle"]}, {"image": PICTURES[1], "captions": captions}]
    Dataset.from_list(rows).to_parquet(tmp_path / "emoji" / "heldout_pairs-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="expected captions, got .* in row 1"):
        recipe.main(arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, kind", [("emoji", "EmojiArguments"), ("coco", "CocoArguments")])
def test_the_recipes_settings_are_read(name, kind):
    parser = TrlParser(getattr(load_recipe(f"evaluate/{name}.py"), kind))
    (arguments,) = parser.parse_args_and_config(["--config", str(REPOSITORY / f"recipes/evaluate/{name}.yaml")])
    settings = read_settings(arguments.settings)
    assert {setting.documents for setting in settings} == {0, 1, 2}
    assert len({json.dumps(setting.arguments) + str(setting.strategy) for setting in settings}) > 3


def test_broken_pictures_stop_a_run_or_are_skipped(tmp_path, capsys):
    cells = [{"bytes": encoded(PICTURES[0]), "path": None}, {"bytes": encoded(PICTURES[1])[:60], "path": "two.png"}]
    rows = Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match=r"picture two.png: .*skip broken"):
        readable_rows(rows, "image")
    assert len(readable_rows(rows, "image", skip_broken=True)) == 1
    assert "skipped picture two.png" in capsys.readouterr().out
