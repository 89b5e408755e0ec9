"""Arrows point one way: the core knows nothing of what stands around it, and can be exported as flat files."""

import ast
import sys
from pathlib import Path

import pytest

import cm3leon_hf

PACKAGE = Path(cm3leon_hf.__file__).parent
AROUND = {"data", "retrieval", "evaluation", "training", "conversion"}
FRONT = {
    "__init__",
    "cli",
    "cli_compare",
    "cli_convert",
    "cli_describe",
    "cli_export",
    "cli_generate",
    "cli_loading",
    "cli_plan",
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
