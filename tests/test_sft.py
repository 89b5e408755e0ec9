"""Fine-tuning: every trainable weight moves, stopped runs go on to the last bit, adapters come back as they were."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import CAPTIONS, GRID_SIZE, IMAGE_SIZE, REPOSITORY, load_recipe, small_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback, pipeline
from trl import ModelConfig, SFTConfig, TrlParser

from cm3leon_hf.training.adapters import load_adapters
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.instruction import InstructionTrainer

RECIPE = load_recipe("sft/train.py")
KINDS = (RECIPE.SFTArguments, RECIPE.ObjectiveArguments, SFTConfig, ModelConfig)
RECIPES = REPOSITORY / "recipes" / "sft"


def instruction_rows(count: int) -> datasets.Dataset:
    """Captions and edits of made-up pictures, in the format of instruction rows."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, IMAGE_SIZE, (2, count, GRID_SIZE**2)).tolist()
    rows = []
    for number in range(count):
        if number % 2:
            texts, codes = (
                ["Describe the given picture.", f" {CAPTIONS[number % 8]}", None],
                [None, None, first[number]],
            )
        else:
            texts, codes = ["Edit:", None, "make it blue", None], [None, first[number], None, second[number]]
        rows.append({"task": "edit", "texts": texts, "codes": codes, "answer": 1 if number % 2 else 3})
    kinds = {
        "task": datasets.Value("string"),
        "texts": datasets.List(datasets.Value("string")),
        "codes": datasets.List(datasets.List(datasets.Value("int32"))),
        "answer": datasets.Value("int32"),
    }
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rows = instruction_rows(26)
    for split, part in {"train": rows.select(range(20)), "validation": rows.select(range(20, 26))}.items():
        part.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def run(folder, data, base, **changes):
    """The recipe, a few steps long."""
    values = {
        "dataset": str(data),
        "model_name_or_path": base,
        "output_dir": str(folder),
        "eval_split": "validation",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 1,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        "image_noise": 0.1,
    }
    RECIPE.main(*TrlParser(KINDS).parse_dict(values | changes))


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def test_two_steps_move_every_weight(data, folder, tmp_path):
    run(tmp_path, data, folder, generation={"max_new_tokens": 7})
    before, after = weights(folder), weights(tmp_path)
    unused = {"model.embed_positions.weight"}  # rows behind the longest document
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        moved = (weight != before[name].to(weight.dtype)).float().mean()
        assert moved > (0.3 if name in unused else 0.9), name
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    assert metrics["eval_loss"] > 0
    pipe = pipeline("any-to-any", model=str(tmp_path))
    assert pipe("a red circle", generation_mode="image")[0]["generated_image"].size == (16, 16)
    assert pipe.model.generation_config.guidance_scale == 3.0 and pipe.model.generation_config.max_new_tokens == 7
