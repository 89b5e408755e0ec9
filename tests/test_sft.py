"""Fine-tuning: every weight moves, stopped runs go on to the last bit, what cannot be trained is said first."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import CAPTIONS, GRID_SIZE, IMAGE_SIZE, REPOSITORY, load_recipe
from safetensors.torch import load_file
from transformers import TrainerCallback, pipeline
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.data.pretraining import fitting_rows
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.batches import set_accumulation
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.instruction import InstructionTrainer

RECIPE = load_recipe("sft/train.py")
KINDS = (RECIPE.SFTArguments, RECIPE.ObjectiveArguments, SFTConfig, ModelConfig)
RECIPES = REPOSITORY / "recipes" / "sft"
TRAINED = {*RECIPES.glob("*.yaml")} - {RECIPES / "grid.yaml", RECIPES / "own_pictures.yaml"}  # by train.py


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


def write_rows(folder: Path) -> Path:
    rows = instruction_rows(26)
    for split, part in {"train": rows.select(range(20)), "validation": rows.select(range(20, 26))}.items():
        part.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


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


def test_box_coordinates_begin_in_order(folder, tmp_path, data):
    run(tmp_path, data, folder, order_locations=True, learning_rate=0.0, weight_decay=0.0)
    model, base = (CM3LeonForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path, folder))
    ids = [*model.config.vocabulary.location_ids.values()]
    before, after = (one.get_input_embeddings().weight.detach() for one in (base, model))
    away = torch.cdist(after[ids], after[ids])
    assert away.diagonal(1).mean() < away.diagonal(8).mean() and len(after[ids].unique(dim=0)) > 250
    others = [index for index in range(len(after)) if index not in ids]
    torch.testing.assert_close(after[others], before[others].to(torch.bfloat16).float())


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def with_callback(monkeypatch, callback: TrainerCallback):
    monkeypatch.setattr(RECIPE, "InstructionTrainer", lambda **k: InstructionTrainer(**k, callbacks=[callback]))


GROUPED = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
PACKED = {"packed": True, "window": 8, "max_length": 96, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("kind", [LORA, PACKED, GROUPED], ids=["adapters", "packed", "grouped"])
def test_a_stopped_run_goes_on_to_the_last_bit(kind, data, folder, tmp_path, monkeypatch):
    settings, name = kind | {"max_steps": 3}, "adapter_model" if "use_peft" in kind else "model"
    run(tmp_path / "whole", data, folder, **settings)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        with_callback(patch, At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run(tmp_path / "stopped", data, folder, **settings)
    assert last_whole_checkpoint(str(tmp_path / "stopped")).endswith("-2")
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "stopped" / f"{name}.safetensors").exists()
    run(tmp_path / "stopped", data, folder, **settings)
    whole, resumed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "stopped"))
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("path", sorted(TRAINED), ids=lambda path: path.stem)
def test_the_recipes_are_read_by_their_script(path):
    args, objective, training, model_args = TrlParser(KINDS).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "true"]
    )
    if args.batch_tokens:
        set_accumulation(training, args.batch_tokens, training.max_length)
        once = training.per_device_train_batch_size * training.max_length
        assert training.gradient_accumulation_steps * once == args.batch_tokens
    assert (get_peft_config(model_args) is not None) == ("lora" in path.stem)
    assert objective.max_spans == 1


@pytest.mark.parametrize("size", ["760m", "7b"])
def test_full_fine_tuning_has_the_papers_values(size):
    values = yaml.safe_load((RECIPES / f"{size}.yaml").read_text(encoding="utf-8"))
    assert values["max_length"] == 4096 and values["batch_tokens"] == 2**21 and values["learning_rate"] == 5e-5
    assert values["warmup_steps"] == 150 and values["max_steps"] * 2**21 == pytest.approx(30e9, rel=1e-4)


def test_four_bits_are_asked_for(monkeypatch):
    _, _, _, model_args = TrlParser(KINDS).parse_args_and_config(
        ["--config", str(RECIPES / "qlora_7b.yaml"), "--use_cpu", "true"]
    )
    asked = {}
    monkeypatch.setattr(RECIPE.AutoModelForCausalLM, "from_pretrained", lambda *_, **kwargs: asked.update(kwargs))
    RECIPE.load_base(model_args)
    quantization = asked["quantization_config"]
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant and quantization.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "either dataset or sources"),
        ({"dataset": "", "sources": [{"path": "a"}]}, "expected packed with sources"),
        ({"muon": True, "use_peft": True}, "expected muon or use_peft, got both"),
        ({"order_locations": True, "use_peft": True}, "expected order_locations or use_peft, got both"),
        ({"max_length": 20}, "at most 20 tokens"),
    ],
)
def test_what_cannot_be_trained_is_said_first(changes, message, data, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data, folder, **changes)


def test_rows_that_do_not_fit_are_skipped_and_counted(processor, caplog):
    rows = instruction_rows(6)
    broken = rows.select(range(2)).to_list()
    broken[0]["codes"][1][0] = IMAGE_SIZE
    broken[1]["texts"][1] = ""
    rows = datasets.concatenate_datasets([rows, datasets.Dataset.from_list(broken, features=rows.features)])
    transform = CM3Transform(processor.tokenizer, processor.vocabulary, 40)
    kept = fitting_rows(rows, transform)  # two pictures of 16 tokens do not fit with their texts
    assert kept["answer"] == [1, 1, 1] and "skipped 5 of 8 rows" in caplog.text
    with pytest.raises(ValueError, match=r"expected columns among .*, got \['words'\]"):
        fitting_rows(datasets.Dataset.from_dict({"words": ["a"]}), transform)


def test_the_grid_runs_what_is_missing_and_prints_a_table(tmp_path, monkeypatch, capsys):
    recipe = load_recipe("sft/grid.py")
    args = recipe.GridArguments("some.yaml", str(tmp_path), [1e-5, 1e-4], [4, 8], flags="--max_steps 3")
    ran = []

    def run(command, check):
        flags = dict(zip(command[2::2], command[3::2]))
        ran.append((flags["--learning_rate"], flags["--per_device_train_batch_size"]))
        assert check and flags["--config"] == "some.yaml" and flags["--max_steps"] == "3"
        if len(ran) == 3:
            raise KeyboardInterrupt
        Path(flags["--output_dir"]).mkdir()
        loss = float(flags["--learning_rate"]) * int(flags["--per_device_train_batch_size"])
        Path(flags["--output_dir"], "eval_results.json").write_text(json.dumps({"eval_loss": loss * 1e4}))

    monkeypatch.setattr(recipe.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(args)
    recipe.main(args)
    assert ran == [("1e-05", "4"), ("1e-05", "8"), ("0.0001", "4"), ("0.0001", "4"), ("0.0001", "8")]
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[1:] == [["1e-05", "0.4000*", "0.8000"], ["0.0001", "4.0000", "8.0000"]]
    values = yaml.safe_load((RECIPES / "grid.yaml").read_text(encoding="utf-8"))
    assert values["learning_rates"] == [1e-5, 3e-5, 5e-5, 1e-4] and values["batch_sizes"] == [4, 8, 16]
