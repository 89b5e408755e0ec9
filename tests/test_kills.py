"""Kill −9: runs that are killed at random moments, checkpoints half written, have the losses of an unbroken run."""

import json
import multiprocessing
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import CAPTIONS, REPOSITORY, small_config
from safetensors.torch import load_file

from cm3leon_hf.training.checkpoints import last_whole_checkpoint

TRAIN = str(REPOSITORY / "recipes/pretrain/train.py")
HEAVY = ["cm3leon_hf.training.pretraining", "datasets", "pytest", "timm", "torchdata.stateful_dataloader", "trl"]


@pytest.fixture(scope="module")
def settings(tokenizer, saved_vqgan, tmp_path_factory) -> dict:
    """A run of the recipe, its every loss logged, with what it reads."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    rows = [{"captions": [CAPTIONS[i % 8]], "codes": rng.integers(0, 32, 16).tolist()} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    tokenizer.save_pretrained(folder / "tokenizer")
    small_config().save_pretrained(folder / "config")
    return {
        "dataset": str(folder),
        "eval_split": "",
        "tokenizer": str(folder / "tokenizer"),
        "model_config": str(folder / "config"),
        "vqgan": saved_vqgan,
        "packing": True,
        "window": 16,
        "image_noise": 0.2,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """Starts the recipe as a process; all are forked from one that has imported what it needs, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)

    def start(folder: Path, max_steps: int) -> multiprocessing.Process:
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(folder), "max_steps": max_steps}))
        monkeypatch.setattr(sys, "argv", [TRAIN, "--config", str(path)])  # the process gets these
        process = context.Process(target=runpy.run_path, args=(TRAIN,), kwargs={"run_name": "__main__"})
        process.start()
        return process

    return start


def kill_behind(process: multiprocessing.Process, written: Path, seconds: float) -> None:
    """Kills a run some time after it wrote something."""
    while not written.exists() and process.is_alive():
        time.sleep(1e-3)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def logged(folder: Path) -> list[tuple]:
    history = json.loads(Path(last_whole_checkpoint(str(folder)), "trainer_state.json").read_text())["log_history"]
    return [(log["step"], log["loss"], log["grad_norm"], log["learning_rate"]) for log in history if "loss" in log]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_losses_are_those_of_an_unbroken_run(kills, start, tmp_path):
    draws, steps = random.Random(kills), 6 * kills + 10
    checkpoints = sorted(draws.sample(range(2, 6 * kills + 1, 2), kills))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    unbroken = start(whole, steps)
    unbroken.join()
    assert unbroken.exitcode == 0
    for number, step in enumerate(checkpoints):
        begun = killed / f"checkpoint-{step}"
        written = begun if number % 2 else begun / "trainer_state.json"  # killed while it saves, or while it trains on
        kill_behind(start(killed, steps), written, draws.uniform(0, 0.02))
    last = start(killed, steps)
    last.join()
    assert last.exitcode == 0
    assert logged(killed) == logged(whole) and len(logged(whole)) == steps
    weights, expected = (load_file(folder / f"checkpoint-{steps}" / "model.safetensors") for folder in (killed, whole))
    assert all(
        torch.equal(weights[name], weight) and weight.dtype == torch.float32 for name, weight in expected.items()
    )
