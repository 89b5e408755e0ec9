"""Adapters: they come back as they were however they are loaded, over their own base alone, quantised or not."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import GRID_SIZE, load_recipe, small_model
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from test_sft import LORA, run, write_rows
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline
from trl import SFTConfig
from typer.testing import CliRunner

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.cli import app
from cm3leon_hf.training.adapters import TARGETS, load_adapters
from cm3leon_hf.training.instruction import InstructionTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


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


def step_under_autocast(tokenizer, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of activations that a step keeps for its backward pass, and the adapters behind it."""
    ids, kept = list(range(300, 364)), {}
    trainer = InstructionTrainer(
        model=small_model().to(torch.bfloat16),
        args=SFTConfig(
            str(folder),
            max_steps=1,
            bf16=True,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=TARGETS, init_lora_weights=False),
    )

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train()
    adapters = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return sum(storage.nbytes() for storage in kept.values()), adapters


def test_adapters_keep_no_copies_of_what_they_read(tokenizer, tmp_path, monkeypatch):
    kept, adapters = step_under_autocast(tokenizer, tmp_path)
    monkeypatch.setattr("cm3leon_hf.training.instruction.disable_input_dtype_casting", lambda *_, **__: nullcontext())
    before, expected = step_under_autocast(tokenizer, tmp_path)
    torch.testing.assert_close(adapters, expected)
    assert kept < 0.9 * before


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
