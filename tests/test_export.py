"""A saved model loads where this package is missing, by `trust_remote_code` alone."""

import filecmp
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from test_architecture import CORE
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.utils import hub
from typer.testing import CliRunner

from cm3leon_hf.cli import app
from cm3leon_hf.configuration_cm3leon import AUTO_MAP

ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path

folder, picture, again = sys.argv[1:]
sys.path = [entry for entry in sys.path if not Path(entry, "cm3leon_hf", "__init__.py").is_file()]
spec = importlib.util.find_spec("cm3leon_hf")
assert spec is None or spec.origin is None  # an editable install leaves a folder with the shipped models

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, pipeline

{outputs}

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
found = outputs(model, processor, Image.open(picture))
pipe = pipeline("any-to-any", model=folder, trust_remote_code=True)
drawn = pipe("a red circle on white", generation_mode="image")[0]["generated_image"]
parts = [AutoModel.from_pretrained(folder, subfolder=name, trust_remote_code=True) for name in ("", "vqgan")]
model.save_pretrained(again)
processor.save_pretrained(again)
types = [type(one).__name__ for one in (*parts, pipe.model)]
print(json.dumps(found | {{"pipeline": drawn.tobytes().hex(), "types": types}}))
"""


def outputs(model, processor, picture: "Image.Image") -> dict:
    """What a model draws, fills and says, greedily; this function runs in both interpreters."""
    torch.manual_seed(0)
    prompts = processor.for_text_to_image(["a red circle on white", "blue"])
    image = {"generation_mode": "image"}
    described = processor.for_image_to_text(picture, "Describe the given picture.")
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, picture.width // 2, picture.height))
    holes = processor.for_infilling(picture, mask, "a red circle")
    ids = {
        "guided": model.generate(**prompts, **image, guidance_scale=3.0),
        "contrastive": model.generate(**prompts, **image, contrastive_alpha=0.2, contrastive_k=2),
        "edited": model.generate(**processor.for_editing(picture, "blue"), **image, image_guidance_scale=1.5),
        "jacobi": model.generate(**prompts, **image, jacobi_window=3, guidance_scale=1.0),
        "filled": model.generate(**holes, **image, guidance_scale=1.0),
        "text": model.generate(**described, max_new_tokens=4),
        "sampled": model.generate(**prompts, **image, guidance_scale=3.0, do_sample=True, num_return_sequences=2),
    }
    drawn = processor.post_process_multimodal_output(ids["guided"], generation_mode="image")[0]
    return {name: value.tolist() for name, value in ids.items()} | {"pixels": drawn.tobytes().hex()}


@pytest.fixture(scope="module")
def found_elsewhere(folder, pictures, tmp_path_factory) -> dict:
    """What an interpreter that cannot import this package makes of the folder, and the folder it has saved."""
    path = tmp_path_factory.mktemp("elsewhere")
    pictures[0].save(path / "picture.png")
    script = ELSEWHERE.format(outputs=inspect.getsource(outputs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(path), "HF_MODULES_CACHE": str(path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, folder, str(path / "picture.png"), str(path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"again": path / "again"}


def code(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.py"))


def test_it_draws_fills_and_describes_as_with_this_package(found_elsewhere, model, processor, pictures):
    expected = outputs(model, processor, pictures[0])
    assert {name: found_elsewhere[name] for name in expected} == expected
    assert found_elsewhere["jacobi"] != found_elsewhere["guided"]  # greedy both, guided only one


def test_the_pipeline_and_every_auto_class_find_the_code(found_elsewhere, model, processor):
    ids = model.generate(
        **processor.for_text_to_image("a red circle on white"), generation_mode="image", guidance_scale=3.0
    )
    drawn = processor.post_process_multimodal_output(ids, generation_mode="image")[0]
    assert found_elsewhere["pipeline"] == drawn.tobytes().hex()
    assert found_elsewhere["types"] == ["CM3LeonModel", "CM3LeonVQGAN", "CM3LeonForCausalLM"]
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert module in CORE and inspect.isclass(getattr(import_module(f"cm3leon_hf.{module}"), name))


def test_a_folder_carries_the_whole_core_also_when_saved_elsewhere(folder, found_elsewhere):
    assert {Path(name).stem for name in code(folder)} == set(CORE)
    assert code(Path(folder, "vqgan")) == ["configuration_vqgan.py", "modeling_vqgan.py"]
    again = found_elsewhere["again"]
    assert filecmp.cmpfiles(folder, again, code(folder), shallow=False)[0] == code(folder)
    assert AutoConfig.from_pretrained(again).auto_map == AUTO_MAP


def test_the_command_adds_the_code_to_a_folder_without(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.py"))
    for name in ("config.json", "processor_config.json"):
        settings = json.loads((bare / name).read_text())
        assert settings.pop("auto_map")
        (bare / name).write_text(json.dumps(settings))
    (bare / "README.md").write_text("card")
    result = CliRunner().invoke(app, ["export", str(bare), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert filecmp.cmpfiles(folder, tmp_path / "out", code(folder), shallow=False)[0] == code(folder)
    for name in ("model.safetensors", "vqgan/model.safetensors", "tokenizer.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (bare / name).read_bytes()
    for name in ("config.json", "processor_config.json"):
        saved, exported = (json.loads(Path(where, name).read_text()) for where in (folder, tmp_path / "out"))
        assert saved["auto_map"].items() <= exported["auto_map"].items()
        assert {**saved, "image_processor": 0, "auto_map": 0} == {**exported, "image_processor": 0, "auto_map": 0}


def test_what_is_pushed_is_what_is_saved(folder, model, processor, tmp_path, monkeypatch):
    """A stand-in for the hub writes each commit's files into a folder, which then draws the same."""

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            path = tmp_path / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("---\n---\n# A model"))
    model.push_to_hub("me/model")
    processor.push_to_hub("me/model")
    pushed = tmp_path / "me/model"
    files = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
    assert not set(files) - {str(path.relative_to(pushed)) for path in pushed.rglob("*")}
    loaded, reader = AutoModelForCausalLM.from_pretrained(pushed), AutoProcessor.from_pretrained(pushed)
    wanted = model.generate(**processor.for_text_to_image("a circle"), generation_mode="image", guidance_scale=1.0)
    found = loaded.generate(**reader.for_text_to_image("a circle"), generation_mode="image", guidance_scale=1.0)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("broken", ["there already", "no model"])
def test_the_command_refuses_before_it_writes(folder, tmp_path, broken):
    source, out = (folder, tmp_path) if broken == "there already" else (tmp_path, tmp_path / "out")
    result = CliRunner().invoke(app, ["export", str(source), str(out)])
    assert result.exit_code == 1 and result.output.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
