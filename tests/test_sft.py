"""Fine-tuning: every trainable weight moves, stopped runs go on to the last bit, adapters come back as they were."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import CAPTIONS, GRID_SIZE, IMAGE_SIZE, REPOSITORY, load_recipe, small_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback, pipeline
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config
from typer.testing import CliRunner

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.cli import app
from cm3leon_hf.data.pretraining import fitting_rows
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.adapters import load_adapters
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


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def with_callback(monkeypatch, callback: TrainerCallback):
    monkeypatch.setattr(RECIPE, "InstructionTrainer", lambda **k: InstructionTrainer(**k, callbacks=[callback]))


PACKED = {"packed": True, "window": 8, "max_length": 96, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("kind", [LORA, PACKED], ids=["adapters", "packed"])
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


@pytest.fixture(scope="module")
def adapters(data, folder, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("adapters")
    run(path, data, folder, **LORA)
    return str(path)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(300, 330)[None]).logits


def test_adapters_on_every_matrix_are_moved(adapters):
    saved = load_file(f"{adapters}/adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 6  # two layers of six matrices, A and B of each
    assert all(weight.abs().max() > 0 for weight in saved.values())  # B starts at zero
    assert all("lora_" in name and "embed" not in name for name in saved)


def test_adapters_come_back_however_they_are_loaded(adapters, folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    own = load_adapters(adapters)
    assert not torch.allclose(logits(own), logits(base), atol=1e-3)
    for model in (
        AutoPeftModelForCausalLM.from_pretrained(adapters),
        AutoModelForCausalLM.from_pretrained(adapters),
        load_adapters(adapters, base),
        load_adapters(adapters, folder).merge_and_unload(),
    ):
        torch.testing.assert_close(logits(model.eval()), logits(own), rtol=1e-4, atol=1e-4)


def test_adapters_draw_and_describe_in_the_pipeline(adapters, pictures):
    pipe = pipeline("any-to-any", model=adapters)
    assert pipe("a red circle", generation_mode="image")[0]["generated_image"].size == (16, 16)
    assert isinstance(pipe({"images": pictures[0], "text": "Describe the given picture."})[0]["generated_text"], str)
    processor = AutoProcessor.from_pretrained(adapters)
    inputs = processor.for_text_to_image(["a red circle"])
    drawn = [
        model.generate(**inputs, generation_mode="image", guidance_scale=3.0, do_sample=False)
        for model in (load_adapters(adapters), load_adapters(adapters).merge_and_unload())
    ]
    assert torch.equal(*drawn)


def test_merged_adapters_are_a_model_by_themselves(adapters, tmp_path):
    recipe = load_recipe("sft/merge.py")
    recipe.main(recipe.MergeArguments(adapters, str(tmp_path / "merged"), dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is CM3LeonForCausalLM and merged.generation_config.guidance_scale == 3.0
    torch.testing.assert_close(logits(merged), logits(load_adapters(adapters)), rtol=1e-4, atol=1e-4)
    flags = ["generate", "a red circle", "--model", adapters, "--num-images", "1", "--out", str(tmp_path / "drawn")]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0 and (tmp_path / "drawn" / "00.png").is_file(), result.output


def test_adapters_of_another_base_are_refused(adapters, folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.layers[1].fc2.weight[0, 0] += 1
    with pytest.raises(ValueError, match="with other values in model.layers.1.fc2.weight; load that base"):
        load_adapters(adapters, other)
    with pytest.raises(ValueError, match="other values in"):
        load_adapters(adapters, small_model(hidden_size=64))
    with pytest.raises(ValueError, match="found no adapter_config.json"):
        load_adapters(folder)
    half = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    with pytest.raises(ValueError, match="found none; train them again"):
        load_adapters(without(adapters, "base.json", tmp_path), half)


def without(folder: str, name: str, copy: Path) -> str:
    for path in Path(folder).glob("adapter_*"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert not (copy / name).exists()
    return str(copy)


def test_positions_are_trained_with_the_adapters_when_asked(data, folder, tmp_path):
    run(tmp_path, data, folder, **LORA, lora_modules_to_save=["embed_positions"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = (name for name in saved if "embed_positions" in name)
    assert not torch.equal(saved[name], load_file(f"{folder}/model.safetensors")["model.embed_positions.weight"])
    assert load_adapters(str(tmp_path))  # whose base still is the one it was


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


def test_adapters_are_trained_over_four_bits(data, processor, tmp_path):
    folder = str(tmp_path / "base")
    small_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)  # quantised 64 weights at a time
    processor.save_pretrained(folder)
    run(tmp_path / "adapters", data, folder, **LORA, load_in_4bit=True, dtype="bfloat16")
    saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(saved) == 24 and all(weight.abs().max() > 0 for weight in saved.values())
    known = json.loads((tmp_path / "adapters" / "base.json").read_text(encoding="utf-8"))
    assert known and not any("proj" in name or "fc" in name for name in known)  # those are quantised
    model = load_adapters(str(tmp_path / "adapters"))
    assert model.generate(torch.tensor([[1, 300, 2]]), generation_mode="image").shape == (1, 3 + GRID_SIZE**2)
    other = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(other.model.embed_positions.weight)
    with pytest.raises(ValueError, match="other values in model.embed_positions.weight"):
        load_adapters(str(tmp_path / "adapters"), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "either dataset or sources"),
        ({"dataset": "", "sources": [{"path": "a"}]}, "expected packed with sources"),
        ({"muon": True, "use_peft": True}, "expected muon or use_peft, got both"),
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


@pytest.fixture(scope="module")
def own_recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield load_recipe("sft/own_pictures.py")


@pytest.fixture
def own_pictures(tmp_path, pictures) -> Path:
    """Seven pairs, of which one lacks a picture, one is broken, and one says nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    rows = [f"{number}.png,{number + 1}.png,make it number {number}" for number in range(4)]
    rows += ["0.png,nowhere.png,vanish", "broken.png,1.png,mend it", "0.png,1.png,"]
    (folder / "metadata.csv").write_text("\n".join(["before,after,instruction", *rows]), encoding="utf-8")
    return folder


def test_your_own_pictures_become_adapters(own_recipe, own_pictures, folder, pictures, tmp_path, caplog):
    kinds = (own_recipe.OwnPicturesArguments, own_recipe.train.SFTArguments, own_recipe.train.ObjectiveArguments)
    flags = {
        "pictures": own_pictures,
        "held_out": 0.25,
        "model_name_or_path": folder,
        "dataset": tmp_path / "rows",
        "output_dir": tmp_path / "adapters",
        "max_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    parser = TrlParser((*kinds, SFTConfig, ModelConfig))
    own_recipe.main(*parser.parse_args_and_config(["--config", str(RECIPES / "own_pictures.yaml"), *words]))
    assert "left out 3 of 7 rows" in caplog.text
    rows = datasets.load_dataset(str(tmp_path / "rows"))
    assert (len(rows["train"]), len(rows["test"])) == (3, 1)
    processor = AutoProcessor.from_pretrained(folder)
    for row in (*rows["train"], *rows["test"]):
        number = int(row["texts"][2].rsplit(" ", 1)[1])
        codes = processor.encode_images([pictures[number], pictures[number + 1]]).tolist()
        assert [row["codes"][1], row["codes"][3]] == codes and row["answer"] == 3
        prompt = processor.for_editing(pictures[number], row["texts"][2])["input_ids"]
        assert processor.decode(prompt[0], skip_special_tokens=True) == row["texts"][0] + row["texts"][2]
    edited = load_adapters(str(tmp_path / "adapters"))
    ids = edited.generate(**processor.for_editing(pictures[0], "make it blue"), generation_mode="image")
    assert processor.post_process_multimodal_output(ids, generation_mode="image")[0].size == (16, 16)


def test_a_folder_that_cannot_be_read(own_recipe, own_pictures, processor):
    table = own_pictures / "metadata.csv"
    table.rename(own_pictures / "table.csv")
    with pytest.raises(ValueError, match="expected metadata.csv or metadata.jsonl in"):
        own_recipe.build_rows(own_pictures, processor)
    (own_pictures / "metadata.jsonl").write_text('{"before": "0.png", "next": "1.png"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected the columns \['before', 'instruction', 'after'\].*without"):
        own_recipe.build_rows(own_pictures, processor)
    (own_pictures / "metadata.jsonl").write_text(
        '{"before": "x.png", "after": "1.png", "instruction": "a"}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="got none of 1"):
        own_recipe.build_rows(own_pictures, processor)


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
