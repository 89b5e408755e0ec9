"""Arrows point one way: the core knows nothing of what stands around it, and can be exported as flat files."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model

import cm3leon_hf
from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM

PACKAGE = Path(cm3leon_hf.__file__).parent
AROUND = {"data", "retrieval", "evaluation", "training", "conversion"}
FRONT = {
    "__init__",
    "cli",
    "cli_compare",
    "cli_convert",
    "app",
    "registration",
    "shipped",
}  # what a user touches, not what is exported
CORE = sorted(
    path.stem
    for path in PACKAGE.glob("*.py")
    if path.stem.startswith(("vocabulary", "configuration_", "modeling_", "processing_", "logits_", "generation_"))
) + ["images"]
CORE_MAY_USE = {"numpy", "PIL", "torch", "transformers"}


def imports(path: Path) -> list[tuple[int, str]]:
    """Every import in a file as its number of leading dots and its module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, a.name) for a in node.names]
    return found


def test_the_core_is_complete():
    wanted = {"vocabulary", "images", "logits_processors", "generation_cm3leon", "processing_cm3leon"}
    assert wanted | {
        f"{kind}_{name}" for kind in ("configuration", "modeling") for name in ("cm3leon", "vqgan")
    } <= set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_core_modules_import_only_core_modules_with_one_dot(name):
    for level, module in imports(PACKAGE / f"{name}.py"):
        if level:
            assert level == 1 and module in CORE, f"{name} imports {'.' * level}{module}"
        else:
            root = module.split(".")[0]
            assert root in sys.stdlib_module_names or root in CORE_MAY_USE, f"{name} imports {module}"


def outer_modules() -> list[Path]:
    return sorted(path for folder in AROUND for path in (PACKAGE / folder).glob("*.py"))


@pytest.mark.parametrize("path", outer_modules(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_stands_around_the_core_does_not_know_what_is_in_front(path):
    for level, module in imports(path):
        root = module.split(".")[0]
        assert not (level == 0 and root == "recipes")
        if level == 2 or (level == 0 and root == "cm3leon_hf"):
            name = module.removeprefix("cm3leon_hf.").split(".")[0]
            assert name not in FRONT, f"{path} imports {module}"


def test_the_core_can_be_exported(tmp_path):
    """What `trust_remote_code` needs: the model's folder carries every module that it imports."""
    CM3LeonConfig.register_for_auto_class()
    CM3LeonForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = small_model()
    try:
        model.save_pretrained(tmp_path)
    finally:
        CM3LeonConfig._auto_class = CM3LeonForCausalLM._auto_class = None
    copied = {path.stem for path in tmp_path.glob("*.py")}
    needed = {"modeling_cm3leon", "generation_cm3leon", "logits_processors", "configuration_cm3leon", "vocabulary"}
    assert needed <= copied <= set(CORE)
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
assert "cm3leon_hf" not in sys.modules
print(model.generate(torch.tensor([[1, 300, 2]]), generation_mode="image").tolist())
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == model.generate(torch.tensor([[1, 300, 2]]), generation_mode="image").tolist()
