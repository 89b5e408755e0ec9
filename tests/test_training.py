"""Training by its recipes: resumed against unbroken, what one recipe writes the next reads, what is logged."""

import json
from pathlib import Path

import datasets
import pytest
import tokenize_images
import torch
import train_tokenizer
from conftest import COLOURS, POSITIONS, SHAPES, TEXT_SIZE, draw, load_recipe, small_config, small_model, small_vqgan
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_vqgan_objective import LOSSES
from transformers import AutoModelForCausalLM, AutoProcessor, TrainingArguments

from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.throughput import ThroughputTrainer
from cm3leon_hf.training.vqgan import VQGANLossConfig


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory) -> str:
    """Two splits of drawn pictures with captions, and a broken picture among them."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "data").mkdir()
    rows = [
        {
            "image": draw(colour, shape, size),
            "captions": [f"a {colour} {shape}", f"{shape}, {colour}, size {size}"],
            "colour": colour,
        }
        for size in (20, 24)
        for colour in COLOURS
        for shape in SHAPES
    ]
    string = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(string), "colour": string})
    for split, part in {"train": rows, "heldout_pairs": rows[::5]}.items():
        data = datasets.Dataset.from_list(part, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def logged(checkpoint: str) -> list[dict]:
    """What the Trainer logged at each step."""
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "loss" in log]


def training(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "report_to": "none",
        }
        | changes
    )


@pytest.fixture(scope="module")
def vqgan_recipe(drawn_data):
    recipe = load_recipe("vqgan/train.py")
    shape = small_vqgan().config.to_diff_dict()
    fields = ("resolution", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions")
    fields += ("latent_channels", "embed_dim", "num_embeddings", "norm_num_groups")
    data = recipe.DataArguments(dataset=drawn_data, vqgan={name: shape[name] for name in fields})

    def run(folder, **changes) -> dict:
        recipe.main(data, VQGANLossConfig(**LOSSES | {"adversarial_start": 1}), training(folder, **changes))
        return load_file(f"{folder}/model.safetensors")

    return run


@pytest.fixture(scope="module")
def trained_vqgan(vqgan_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return str(folder), vqgan_recipe(folder, max_steps=4)


def test_a_resumed_vqgan_equals_an_unbroken_one(vqgan_recipe, trained_vqgan, tmp_path):
    unbroken = trained_vqgan[1]
    stopped = vqgan_recipe(tmp_path, max_steps=2)
    torn = tmp_path / "checkpoint-3"  # as a machine that dies while saving leaves it
    torn.mkdir()
    resumed = vqgan_recipe(tmp_path, max_steps=4)
    assert any(not torch.equal(stopped[name], value) for name, value in unbroken.items())
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_the_trainer_logs_every_loss_and_the_codebooks_use(trained_vqgan):
    folder, _ = trained_vqgan
    steps = logged(last_whole_checkpoint(folder))
    parts = ("commitment", "reconstruction", "generator", "discriminator")
    assert all(log["loss"] == pytest.approx(sum(log[name] for name in parts if name in log), abs=2e-3) for log in steps)
    assert "generator" not in steps[0] and "generator" in steps[1]


def test_last_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(str(tmp_path)) is last_whole_checkpoint(str(tmp_path / "nowhere")) is None
    (tmp_path / "checkpoint-13").mkdir()
    for step, state in ((9, "{}"), (10, '{"epoch": 1}'), (11, ""), (12, '{"epoch"')):  # of the last, half is written
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_from_pictures_to_a_model_that_draws(drawn_data, trained_vqgan, tmp_path, monkeypatch):
    """The recipes one after the other, each a few steps long: what one writes, the next reads."""
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    vqgan, tokenizer, codes, model = (
        trained_vqgan[0],
        *(str(tmp_path / name) for name in ("tokenizer", "codes", "model")),
    )
    train_tokenizer.main(
        train_tokenizer.TokenizerArguments(dataset=drawn_data, output_dir=tokenizer, text_vocab_size=TEXT_SIZE)
    )
    tokenize_images.main(tokenize_images.CodesArguments(dataset=drawn_data, vqgan=vqgan, output_dir=codes))
    small_config(initializer_range=0.02, zero_init="residual").save_pretrained(tmp_path / "config")
    recipe = load_recipe("pretrain/train.py")
    arguments = recipe.PretrainArguments(
        dataset=codes,
        model_config=str(tmp_path / "config"),
        tokenizer=tokenizer,
        vqgan=vqgan,
        generation={"guidance_scale": 3.0, "max_new_tokens": 5},
        card={"license": "mit", "language": "en"},
    )
    objective = recipe.ObjectiveArguments(whole_segment=0.5, instruction_share=0.2)
    recipe.main(arguments, objective, training(model, max_steps=3, learning_rate=5e-3))
    losses = [log["loss"] for log in logged(f"{model}/checkpoint-3")]
    assert len(losses) == 3 and losses[-1] < losses[0]

    arguments.init_from, model = model, str(tmp_path / "second")
    arguments.muon, arguments.balance, arguments.passes = True, ["colour"], 2
    recipe.main(arguments, objective, training(model, max_steps=3, learning_rate=5e-3))
    second = [log["loss"] for log in logged(f"{model}/checkpoint-3")]
    assert second[0] < losses[0] and second[-1] < second[0]

    loaded, processor = AutoModelForCausalLM.from_pretrained(model), AutoProcessor.from_pretrained(model)
    assert loaded.dtype == torch.bfloat16 and loaded.config.max_position_embeddings == POSITIONS
    ids = loaded.generate(**processor.for_text_to_image(["a red circle"] * 2), generation_mode="image", do_sample=True)
    card = ModelCard.load(f"{model}/README.md")
    assert card.data.license == "mit" and "| steps | 3 |" in card.text and "| optimiser | Muon |" in card.text
    assert [one.metric_type for one in card.data.eval_results] == ["eval_loss"]
    images = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [image.size for image in images] == [(16, 16)] * 2
    inputs = processor.for_image_to_text(draw("red", "circle"), "Describe the given picture.")
    assert loaded.generate(**inputs).shape[1] <= inputs["input_ids"].shape[1] + 5


def test_broken_pictures_are_skipped_and_files_are_read(trained_vqgan, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        draw("red", "circle").save(folder / f"{name}.png")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:60])
    arguments = {"vqgan": trained_vqgan[0], "output_dir": str(tmp_path / "codes")}
    tokenize_images.main(tokenize_images.CodesArguments(dataset=str(folder), **arguments))
    assert "train: 3 pictures, 1 skipped" in capsys.readouterr().out
    rows = datasets.load_dataset(str(tmp_path / "codes"), split="train")["codes"]
    processor = tokenize_images.AutoImageProcessor.from_pretrained(trained_vqgan[0])
    vqgan = tokenize_images.CM3LeonVQGAN.from_pretrained(trained_vqgan[0])
    pixels = processor([Image.open(folder / "a.png")], return_tensors="pt")["pixel_values"]
    assert list(rows) == vqgan.encode(pixels).tolist() * 3


def test_throughput_counts_tokens_and_leaves_padding_out(tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    model = small_model()
    trainer = ThroughputTrainer(model=model, args=training(tmp_path, max_steps=1))
    ids = torch.randint(6, 600, (2, 10))
    labels = ids.clone()
    labels[1, 6:] = -100
    monkeypatch.setattr(ThroughputTrainer.__base__, "training_step", lambda *_: torch.tensor(0.0))
    trainer.training_step(model, {"input_ids": ids, "labels": labels})
    assert trainer.tokens == 16
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name)
    head = 632 * 32
    assert trainer.flops == pytest.approx(6 * (matrices + head) * 16 + 12 * 2 * 32 * (100 + 36) / 2)
