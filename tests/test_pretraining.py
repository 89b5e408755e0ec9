"""Pretraining: what was stopped goes on to the last bit, faults are survived, two processes equal one."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import CAPTIONS, load_recipe, small_config, small_model
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.pretraining import PretrainingTrainer, perplexities, token_losses

RECIPE = load_recipe("pretrain/train.py")
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def no_measurement():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
        yield


@pytest.fixture(scope="module")
def inputs(tokenizer, saved_vqgan, tmp_path_factory) -> Path:
    """Codes with captions, a tokenizer and a model's configuration, as the recipe reads them."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    rows = [{"captions": [CAPTIONS[i % 8], CAPTIONS[0]], "codes": rng.integers(0, 32, 16)} for i in range(40)]
    kinds = {"captions": datasets.List(datasets.Value("string")), "codes": datasets.List(datasets.Value("uint16"))}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    for split, part in {"train": data, "heldout_pairs": data.select(range(6))}.items():
        data_folder = folder / "codes" / "data"
        part.to_parquet(data_folder / f"{split}-00000-of-00001.parquet")
    tokenizer.save_pretrained(folder / "tokenizer")
    small_config().save_pretrained(folder / "config")
    (folder / "vqgan").symlink_to(saved_vqgan)
    return folder


def arguments(inputs: Path, **changes):
    common = {
        "model_config": str(inputs / "config"),
        "tokenizer": str(inputs / "tokenizer"),
        "vqgan": str(inputs / "vqgan"),
    }
    return RECIPE.PretrainArguments(**common | {"dataset": str(inputs / "codes"), "window": 16} | changes)


def training(folder, **changes) -> TrainingArguments:
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 2,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(**common | changes)


OBJECTIVE = RECIPE.ObjectiveArguments(image_noise=0.2, instruction_share=0.1)
KINDS = {
    "rows": ({"packing": False}, {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 3}),
    "packed": ({"packing": True}, {}),
    "workers": ({"packing": True, "separate_documents": True}, {"dataloader_num_workers": 2}),
}


def losses(folder) -> list[float]:
    state = json.loads(Path(last_whole_checkpoint(str(folder)), "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.fixture(scope="module", params=KINDS)
def unbroken(request, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    changes, settings = KINDS[request.param]
    RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(folder, **settings))
    return folder, changes, settings


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def with_callback(monkeypatch, callback: TrainerCallback):
    monkeypatch.setattr(
        RECIPE, "PretrainingTrainer", lambda **kwargs: PretrainingTrainer(**kwargs, callbacks=[callback])
    )


def check_equal(folder, unbroken) -> None:
    got, expected = (load_file(f"{path}/model.safetensors") for path in (folder, unbroken))
    assert losses(folder) == losses(unbroken) and len(losses(folder)) >= STEPS
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_goes_on_to_the_last_bit(unbroken, inputs, tmp_path, monkeypatch, step):
    whole, changes, settings = unbroken
    with monkeypatch.context() as patch:
        with_callback(patch, At(step, crash))
        with pytest.raises(KeyboardInterrupt):
            RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, **settings))
    RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, **settings))
    check_equal(tmp_path, whole)


def test_sigterm_saves_the_step_and_stops(unbroken, inputs, tmp_path, monkeypatch):
    (whole, changes, settings), before = unbroken, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        with_callback(patch, At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, **settings))
    assert last_whole_checkpoint(str(tmp_path)).endswith("-3") and not (tmp_path / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, **settings))
    check_equal(tmp_path, whole)


def test_a_full_disk_leaves_the_last_good_checkpoint(unbroken, inputs, tmp_path, monkeypatch):
    whole, changes, settings = unbroken
    write = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        write(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, save_total_limit=1, **settings))
    assert (tmp_path / "checkpoint-4").exists() and last_whole_checkpoint(str(tmp_path)).endswith("-2")
    RECIPE.main(arguments(inputs, **changes), OBJECTIVE, training(tmp_path, **settings))
    check_equal(tmp_path, whole)


class Poison(TrainerCallback):
    """Makes the loss of some steps infinite, and keeps what the weights were before and after each step."""

    def __init__(self, steps: set[int]):
        self.steps, self.weights, self.hook = steps, [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        if self.hook:
            self.hook.remove()
        self.hook = model.register_forward_hook(self.spoil) if state.global_step in self.steps else None

    @staticmethod
    def spoil(model, inputs, output):
        output["loss"] = model.lm_head.weight.sum() * torch.inf


def test_steps_that_are_not_finite_are_skipped_and_their_batches_kept(inputs, tmp_path, monkeypatch):
    poison = Poison({2, 3})
    with_callback(monkeypatch, poison)
    RECIPE.main(arguments(inputs, packing=True), OBJECTIVE, training(tmp_path))
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(poison.weights, poison.weights[1:])
    ]
    assert same == [True, False, True, True, False]  # the first step's rate is 0
    files = sorted((tmp_path / "not_finite").iterdir())
    assert [path.name for path in files] == ["step-3-rank-0.pt", "step-4-rank-0.pt"]
    batches = torch.load(files[0])
    assert [batch["input_ids"].shape for batch in batches] == [(2, 96)] * 2
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "model.safetensors").values())


def test_the_budget_of_skipped_steps_counts_over_resumptions(inputs, tmp_path, monkeypatch):
    with_callback(monkeypatch, Poison({1, 4}))
    few = arguments(inputs, packing=True, max_skipped_steps=1)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="at most 1 steps whose gradient is not finite, got 2"):
            RECIPE.main(few, OBJECTIVE, training(tmp_path))
    assert last_whole_checkpoint(str(tmp_path)).endswith("-4")


def test_another_number_of_processes_is_refused(unbroken, inputs, tmp_path):
    folder, changes, settings = unbroken
    trainer = PretrainingTrainer(model=small_model(), args=training(tmp_path), vocabulary=small_config().vocabulary)
    with pytest.raises(ValueError, match="another number of processes; use as many as before"):
        (tmp_path / "empty").mkdir()
        trainer._load_rng_state(str(tmp_path / "empty"))


def test_perplexity_of_each_modality(vocabulary):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 8, vocabulary.size), torch.randint(300, 400, (3, 8))
    labels[:, 3:6] = torch.randint(vocabulary.text_size, vocabulary.size, (3, 3))
    labels[1, 6:] = -100
    found = perplexities(EvalPrediction(token_losses(vocabulary)(logits, labels).numpy(), labels.numpy()))
    targets = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    image, text = losses[targets >= 600], losses[(targets < 600) & (targets >= 0)]
    expected = {"text_perplexity": text, "image_perplexity": image, "perplexity": torch.cat([text, image])}
    assert found == {name: pytest.approx(each.mean().exp().item(), rel=1e-5) for name, each in expected.items()}
    only_text = perplexities(EvalPrediction(np.array([[2.0, 0, 4, 0]]), None))
    assert set(only_text) == {"perplexity", "text_perplexity"}


def test_perplexities_are_measured_while_training_and_plotted(inputs, tmp_path):
    run, picture = tmp_path / "run", tmp_path / "curves.png"
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    RECIPE.main(arguments(inputs, packing=True), OBJECTIVE, training(run, **settings))
    curves = load_recipe("plot_curves.py")
    curves.main(curves.CurveArguments(str(run), str(picture)))
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in curves.plt.gcf().axes[1].get_lines()}
    assert lines.keys() == {"held out text", "held out image"} and picture.exists()
    for modality in ("text", "image"):
        name = f"eval_{modality}_perplexity"
        assert lines[f"held out {modality}"] == [[log["step"], log[name]] for log in history if name in log]
    assert [step for step, _ in lines["held out text"]] == [2, 4]


def test_accumulation_makes_batches_of_as_many_tokens(inputs):
    settings = training("out")
    RECIPE.set_accumulation(settings, 96 * 2 * 5, 96)
    assert settings.gradient_accumulation_steps == 5
    with pytest.raises(ValueError, match="a multiple of the 192 tokens that 1 processes read at once, got 200"):
        RECIPE.set_accumulation(settings, 200, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "either dataset or sources"),
        ({"dataset": "", "sources": [{"path": "a"}]}, "expected packing"),
        ({"dataset": "", "sources": [{"path": "a"}], "packing": True, "balance": ["b"]}, "expected balance with a"),
    ],
)
def test_arguments_that_cannot_be(inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(inputs, **changes)
