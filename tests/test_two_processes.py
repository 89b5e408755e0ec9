"""Two processes that share a model's weights learn what one process learns, and save it whole."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import CAPTIONS, REPOSITORY, small_config
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from cm3leon_hf.training.checkpoints import last_whole_checkpoint


@pytest.fixture(scope="module")
def settings(tokenizer, saved_vqgan, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    rows = [{"captions": [CAPTIONS[i % 8]], "codes": rng.integers(0, 32, 16).tolist()} for i in range(16)]
    for split, part in {"train": rows, "heldout_pairs": rows[:4]}.items():
        datasets.Dataset.from_list(part).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    tokenizer.save_pretrained(folder / "tokenizer")
    small_config().save_pretrained(folder / "config")
    return {
        "dataset": str(folder),
        "tokenizer": str(folder / "tokenizer"),
        "model_config": str(folder / "config"),
        "vqgan": saved_vqgan,
        "use_cpu": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "remove_unused_columns": False,
        "report_to": "none",
    }


def losses(launcher: list[str], settings: dict, folder, **changes) -> list[float]:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "out")} | changes))
    command = [*launcher, str(REPOSITORY / "recipes/pretrain/train.py"), "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (folder / "out" / "model.safetensors").exists()
    state = json.loads((folder / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert last_whole_checkpoint(str(folder / "out"))
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def started_by(name: str, folder: Path) -> list[str]:
    """Starts a script on two processes by one of the recipes' launch files."""
    wrapper = [str(Path(__file__).with_name("fsdp_on_cpu.py"))] if name == "fsdp2" else []
    config = yaml.safe_load((REPOSITORY / f"recipes/accelerate/{name}.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / f"{name}.yaml"), *wrapper]


@pytest.fixture
def launcher(tmp_path) -> list[str]:
    """Starts a script on two processes under FSDP2."""
    return started_by("fsdp2", tmp_path)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_two_processes_learn_what_one_does(settings, name, tmp_path, monkeypatch):
    if name == "zero3":
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folders = [tmp_path / count for count in ("two", "one")]
    for folder in folders:
        folder.mkdir()
    two = losses(started_by(name, tmp_path), settings, folders[0], per_device_train_batch_size=2)
    one = losses([sys.executable], settings, folders[1], per_device_train_batch_size=4)
    assert two == pytest.approx(one, rel=1e-3) and len(set(one)) == 3


STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

{function}

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
assert stock_training(model, sys.argv[2], batch_size=2) == "FSDPCM3LeonForCausalLM"
"""


def stock_training(model, out: str, batch_size: int) -> str:
    """Three steps over four rows by the stock Trainer, which writes a checkpoint, and the model besides; its class."""
    rows = [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(10, 600, (4, 12), generator=torch.manual_seed(0))
    ]
    arguments = {"max_steps": 3, "learning_rate": 1e-2, "save_steps": 3, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model, TrainingArguments(out, per_device_train_batch_size=batch_size, **arguments), train_dataset=rows
    )
    trainer.train()
    trainer.save_model(out)
    return type(trainer.model).__name__


def code(folder: Path) -> dict[str, str]:
    """The files of a model folder that are text: its code and its configuration."""
    return {path.name: path.read_text("utf-8") for pattern in ("*.py", "config.json") for path in folder.glob(pattern)}


def test_what_stock_training_under_fsdp2_saves_carries_its_code(folder, launcher, tmp_path):
    """An exported model, whose class FSDP2 replaces, is saved whole by `save_pretrained`, in checkpoints as well."""
    (tmp_path / "train.py").write_text(STOCK.format(function=inspect.getsource(stock_training)))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [*launcher, str(tmp_path / "train.py"), folder, str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    stock_training(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "one"), batch_size=4)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert not torch.equal(one.lm_head.weight, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
    for saved in (tmp_path / "two", tmp_path / "two" / "checkpoint-3"):
        assert code(saved) == code(tmp_path / "one") and "modeling_cm3leon.py" in code(saved)
        two = AutoModelForCausalLM.from_pretrained(saved)
        for name, weight in one.named_parameters():
            torch.testing.assert_close(two.get_parameter(name), weight, atol=1e-4, rtol=1e-4)
