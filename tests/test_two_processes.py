"""Two processes that share a model's weights learn what one process learns."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import yaml
from conftest import CAPTIONS, REPOSITORY, small_config

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


def test_fsdp2_on_two_processes_equals_one(settings, tmp_path):
    config = yaml.safe_load((REPOSITORY / "recipes/accelerate/fsdp2.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    folders = [tmp_path / name for name in ("two", "one")]
    for folder in folders:
        folder.mkdir()
    two = losses(launcher, settings, folders[0], per_device_train_batch_size=2)
    one = losses([sys.executable], settings, folders[1], per_device_train_batch_size=4)
    assert two == pytest.approx(one, rel=1e-3) and len(set(one)) == 3
