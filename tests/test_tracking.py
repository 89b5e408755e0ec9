"""`report_to: aim`: what the Trainer logs, perplexity of each modality as well, is what Aim holds."""

import sys
from types import ModuleType

import pytest
import torch
from conftest import small_model
from transformers import TrainerCallback, TrainingArguments

from cm3leon_hf.training.pretraining import PretrainingTrainer


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.arange(300, 308), torch.arange(600, 608) + index])  # text, then image ids
        return {"input_ids": ids, "labels": ids}


def trainer(folder, monkeypatch) -> PretrainingTrainer:
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    model = small_model()
    args = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    args |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "aim"}
    data = {"train_dataset": Rows(), "eval_dataset": Rows()}
    return PretrainingTrainer(model=model, args=TrainingArguments(**args), vocabulary=model.config.vocabulary, **data)


def test_the_trainer_reports_to_aims_callback(tmp_path, monkeypatch):
    logged = {}

    class AimCallback(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.update({name: (state.global_step, value) for name, value in logs.items()})

    package = ModuleType("aim.hugging_face")
    package.AimCallback = AimCallback
    monkeypatch.setitem(sys.modules, "aim", ModuleType("aim"))
    monkeypatch.setitem(sys.modules, "aim.hugging_face", package)
    trainer(tmp_path, monkeypatch).train()
    assert logged["loss"][0] == 2 and {"eval_text_perplexity", "eval_image_perplexity"} <= logged.keys()


def test_without_aim_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim.hugging_face", None)
    with pytest.raises(ImportError, match=r"found none; install it with pip install 'cm3leon_hf\[aim\]'"):
        trainer(tmp_path, monkeypatch)


def test_aim_holds_what_was_logged(tmp_path, monkeypatch):
    aim = pytest.importorskip("aim")
    monkeypatch.chdir(tmp_path)
    ours = trainer(tmp_path / "run", monkeypatch)
    ours.train()
    [name] = aim.Repo(str(tmp_path)).list_all_runs()
    run = aim.Run(name, repo=str(tmp_path), system_tracking_interval=None, capture_terminal_logs=False)
    held = {
        (metric, context.to_dict().get("subset")): run.get_metric(metric, context).values.sparse_list()[1]
        for metric, context, _ in run.iter_metrics_info()
    }
    history = ours.state.log_history
    assert sorted(held["loss", None]) == sorted(log["loss"] for log in history if "loss" in log)
    for metric in ("loss", "text_perplexity", "image_perplexity"):
        assert held[metric, "eval"] == [log[f"eval_{metric}"] for log in history if f"eval_{metric}" in log]
    assert run["hparams"]["max_steps"] == 2
    run.close()
