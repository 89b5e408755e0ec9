"""Preference tuning: rewards are those of what was drawn, pairs are best and worst, and every trained weight moves."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import CAPTIONS, GRID_SIZE, REPOSITORY, TEXT_SIZE, load_recipe
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline
from trl import DPOConfig, GRPOConfig, ModelConfig, TrlParser

from cm3leon_hf.training.adapters import load_adapters
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.preference import PictureReward, prompt_rows

LENGTH = GRID_SIZE**2
RECIPES = REPOSITORY / "recipes" / "preference"
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield {name: load_recipe(f"preference/{name}.py") for name in ("grpo", "pairs", "dpo")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("captions")
    rows = datasets.Dataset.from_dict({"captions": [[caption, CAPTIONS[0]] for caption in CAPTIONS]})
    rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


def redness(images: list[Image.Image], texts: list[str]) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def training(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
    } | changes


def logged(folder, name: str) -> list[float]:
    state = json.loads(Path(last_whole_checkpoint(str(folder)), "trainer_state.json").read_text(encoding="utf-8"))
    return [log[name] for log in state["log_history"] if name in log]


def check_every_weight_moved(before: str, after: str) -> None:
    before, after = (load_file(f"{path}/model.safetensors") for path in (before, after))
    for name, weight in after.items():
        moved = (weight != before[name].to(weight.dtype)).any(-1).float().mean()
        assert moved > (0.2 if "positions" in name else 0.9), name


def test_prompts_are_those_that_the_processor_makes(processor):
    rows = prompt_rows(CAPTIONS)
    for row in rows:
        ids = processor.tokenizer(text=[row["prompt"]])["input_ids"][0]
        assert ids == processor.for_text_to_image(row["caption"])["input_ids"][0].tolist()


def test_the_reward_is_the_score_of_the_picture(processor, pictures):
    codes = processor.encode_images(pictures[:3])
    ids = processor.vocabulary.codes_to_ids(codes).tolist()
    seen = []
    reward = PictureReward(processor, lambda images, texts: seen.append(texts) or redness(images, texts))
    found = reward(ids, CAPTIONS[:3], completions=[""] * 3)
    assert found == redness(processor.decode_images(codes), CAPTIONS[:3]) and seen == [CAPTIONS[:3]]


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters"])
def test_two_steps_of_grpo_move_every_weight(adapted, recipes, data, folder, small_clip, tmp_path):
    changes = {"num_generations": 4, "per_device_train_batch_size": 8, "beta": 0.1 * adapted}
    values = training(tmp_path, **changes) | {"dataset": data, "clip_model": small_clip, "model_name_or_path": folder}
    kinds = (recipes["grpo"].RewardArguments, GRPOConfig, ModelConfig)
    recipes["grpo"].main(*TrlParser(kinds).parse_dict(values | (LORA if adapted else {})))
    assert len(logged(tmp_path, "reward")) == 2 and all(-1 <= reward <= 1 for reward in logged(tmp_path, "reward"))
    assert logged(tmp_path, "completions/mean_length") == [LENGTH] * 2
    assert all(deviation > 0 for deviation in logged(tmp_path, "reward_std"))
    if adapted:
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert len(saved) == 24 and all(weight.abs().max() > 0 for weight in saved.values())
        assert load_adapters(str(tmp_path))
    else:
        check_every_weight_moved(folder, str(tmp_path))
    pipe = pipeline("any-to-any", model=str(tmp_path))
    assert pipe("a red circle", generation_mode="image")[0]["generated_image"].size == (16, 16)
    assert pipe.model.generation_config.guidance_scale == 3.0  # as the base's, not as in training


@pytest.fixture(scope="module")
def pairs(recipes, data, folder, small_clip, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("pairs"))
    arguments = {"dataset": data, "clip_model": small_clip, "model": folder, "out": out}
    recipes["pairs"].main(recipes["pairs"].PairArguments(**arguments, batch_size=3, margin=1e-6))
    return out


def test_pairs_are_the_best_and_the_worst(recipes, folder, processor):
    args = recipes["pairs"].PairArguments(dataset="", margin=0.0, candidates=3)
    drawn = []

    def number(images, texts):
        drawn.append((images, texts))
        return [float(index % 3) if index < 3 else 0.5 for index in range(len(images))]

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = recipes["pairs"].draw_pairs(args, model, PictureReward(processor, number), CAPTIONS[:2])
    images, texts = drawn[0]
    assert texts == [caption for caption in CAPTIONS[:2] for _ in range(3)]
    assert (first["chosen_score"], first["rejected_score"]) == (2.0, 0.0) and first["caption"] == CAPTIONS[0]
    assert first["prompt_ids"] == processor.for_text_to_image(CAPTIONS[0])["input_ids"][0].tolist()
    for name, image in (("chosen_ids", images[2]), ("rejected_ids", images[0])):
        decoded = processor.post_process_multimodal_output(torch.tensor([first[name]]), generation_mode="image")[0]
        assert np.array_equal(decoded, image)
    args.margin = 0.1
    assert len(recipes["pairs"].draw_pairs(args, model, PictureReward(processor, number), CAPTIONS[:2])) == 1


def test_two_steps_of_dpo_move_every_weight(recipes, pairs, folder, tmp_path):
    rows = datasets.load_dataset(pairs, split="train")
    assert all(len(ids) == LENGTH and min(ids) >= TEXT_SIZE for ids in (*rows["chosen_ids"], *rows["rejected_ids"]))
    kinds = (recipes["dpo"].PairsArguments, DPOConfig, ModelConfig)
    values = training(tmp_path, per_device_train_batch_size=4) | {"dataset": pairs, "model_name_or_path": folder}
    recipes["dpo"].main(*TrlParser(kinds).parse_dict(values))
    check_every_weight_moved(folder, str(tmp_path))
    margins = logged(tmp_path, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[1] != 0  # the reference is where training begins


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_the_recipes_are_read_by_their_scripts(name, recipes):
    kinds = {"grpo": ("RewardArguments", GRPOConfig), "dpo": ("PairsArguments", DPOConfig)}[name]
    parser = TrlParser((getattr(recipes[name], kinds[0]), kinds[1], ModelConfig))
    _, _, model_args = parser.parse_args_and_config(
        ["--config", str(RECIPES / f"emoji_{name}.yaml"), "--use_cpu", "true"]
    )
    assert model_args.use_peft


def test_what_cannot_be_tuned_is_said_first(recipes, data):
    with pytest.raises(ValueError, match="at least 2 candidates, of which one is better, got 1"):
        recipes["pairs"].PairArguments(dataset=data, candidates=1)
    with pytest.raises(ValueError, match=r"expected the columns \['prompt_ids'.*draw pairs with pairs.py"):
        recipes["dpo"].read_pairs(recipes["dpo"].PairsArguments(dataset=data))
    training = GRPOConfig("out", beta=0.1, use_cpu=True)
    with pytest.raises(ValueError, match="expected beta 0 or use_peft"):
        recipes["grpo"].main(recipes["grpo"].RewardArguments(dataset=data), training, ModelConfig())
