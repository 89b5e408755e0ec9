"""Planning: the paper's table, what a small model really keeps, and the recipes that were planned so."""

import pytest
import torch
import yaml
from conftest import POSITIONS, REPOSITORY, load_recipe, small_config, small_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from trl import TrlParser
from typer.testing import CliRunner

from cm3leon_hf import planning
from cm3leon_hf.cli import app
from cm3leon_hf.training.adapters import TARGETS
from cm3leon_hf.training.throughput import ThroughputTrainer

RECIPES = REPOSITORY / "recipes" / "pretrain"
TABLE_3 = {  # parameters, learning rate, GPUs, tokens
    "350m": (372_244_480, 6e-4, 256, 1.4e12),
    "760m": (784_859_136, 5e-4, 256, 1.9e12),
    "7b": (6_723_469_312, 1.2e-4, 512, 2.4e12),
}


@pytest.fixture(scope="module", params=TABLE_3)
def row(request):
    config = AutoConfig.from_pretrained(RECIPES / request.param)
    values = yaml.safe_load((RECIPES / request.param / "train.yaml").read_text(encoding="utf-8"))
    return config, values, *TABLE_3[request.param]


def test_the_recipes_are_the_papers_table(row):
    config, values, parameters, rate, gpus, tokens = row
    assert planning.count_parameters(config) == parameters and config.max_position_embeddings == 4096
    assert values["learning_rate"] == rate and values["warmup_steps"] == 1500 and values["batch_tokens"] == 2**23
    assert values["max_steps"] * values["batch_tokens"] == pytest.approx(tokens, rel=1e-5)


def test_the_recipes_fit_as_planned(row):
    config, values, parameters, _, gpus, tokens = row
    plan = planning.plan(config, gpus, planning.GPUS["a100"], tokens, 2**23)
    assert plan.layout.sequences == values["per_device_train_batch_size"]
    assert plan.layout.checkpointed == values["gradient_checkpointing"]
    assert plan.accumulation * plan.layout.sequences * gpus * 4096 == 2**23 and plan.steps == pytest.approx(
        values["max_steps"], abs=1
    )
    assert sum(plan.memory.values()) <= 0.9 * 80
    assert plan.flops_per_token == pytest.approx(6 * parameters, rel=0.32)  # and the attention's products
    assert plan.gpu_hours == pytest.approx(tokens * plan.flops_per_token / 312e12 / 0.4 / 3600)
    assert plan.days == pytest.approx(plan.gpu_hours / gpus / 24)


@pytest.mark.parametrize("name", ["tiny", "emoji", *TABLE_3])
def test_the_recipes_are_read_by_their_script(name, monkeypatch):
    recipe = load_recipe("pretrain/train.py")
    kinds = (recipe.PretrainArguments, recipe.ObjectiveArguments, TrainingArguments)
    flags = ["--config", str(RECIPES / name / "train.yaml"), "--use_cpu", "true"]
    args, objective, training = TrlParser(kinds).parse_args_and_config(flags)
    config = AutoConfig.from_pretrained(REPOSITORY / args.model_config)
    recipe.set_accumulation(training, args.batch_tokens, config.max_position_embeddings)
    assert objective.max_spans <= config.num_masks and args.packing == (name != "emoji")
    if args.packing:
        once = training.per_device_train_batch_size * config.max_position_embeddings
        assert training.gradient_accumulation_steps * once == args.batch_tokens


def kept_bytes(layers: int, checkpointed: bool) -> int:
    """Bytes of activations that the layers of a model keep for the backward pass, measured."""
    model = small_model(num_hidden_layers=layers, hidden_size=64, intermediate_size=256, use_cache=False).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    matrices = {shape for weight in model.model.layers.parameters() for shape in (weight.shape, weight.T.shape)}
    kept = {}

    def pack(tensor):
        if tensor.shape not in matrices:  # weights, and their copies in bfloat16
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.model(torch.full((2, 96), 300))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_keeps_as_many_bytes_as_planned(checkpointed):
    measured = kept_bytes(5, checkpointed) - kept_bytes(3, checkpointed)
    planned = [
        planning.activation_bytes(
            small_config(num_hidden_layers=layers, hidden_size=64, intermediate_size=256), checkpointed
        )
        for layers in (5, 3)
    ]
    assert measured / (2 * 96) == pytest.approx(planned[0] - planned[1], rel=0.03)


def test_flops_are_those_that_training_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    model = small_model()
    trainer = ThroughputTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    length = model.config.max_position_embeddings
    counted = trainer.flops_per_token + trainer.attention_flops * length / 2
    assert planning.flops_per_token(model.config) == counted


def test_flops_are_those_of_the_operations():
    model = small_model(attn_implementation="eager").train()
    config, ids = model.config, torch.randint(6, 600, (2, POSITIONS))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    hidden_half = 6 * config.num_hidden_layers * config.hidden_size * POSITIONS  # that causality hides, computed here
    assert counter.get_total_flops() / ids.numel() == planning.flops_per_token(config) + hidden_half


def test_weights_gradients_and_moments_take_what_is_planned():
    model = small_model().train()
    ids = torch.randint(6, 600, (2, POSITIONS))
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    weights = [*model.parameters()]
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    planned = planning.full_bytes(model.config, planning.Layout(False, False, 2), 1)
    assert planned["gradients"] == sum(weight.grad.nbytes for weight in weights)
    assert planned["optimizer"] == sum(moment.nbytes for moment in moments)
    copies = sum(weight.to(torch.bfloat16).nbytes for weight in weights)  # autocast keeps them until the step
    assert planned["weights"] == sum(weight.nbytes for weight in weights) + copies


class FullSequences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(6, 600, (POSITIONS,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_a_run_takes_as_long_as_planned_at_the_rate_that_it_logs(tmp_path, monkeypatch):
    peak = 1e-3  # of this made-up device, in TFLOP/s
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: peak)
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 4, "logging_steps": 4, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **settings)
    trainer = ThroughputTrainer(model=small_model(), args=args, train_dataset=FullSequences())
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "tokens_per_second" in log]
    tokens, batch = 4 * 2 * POSITIONS, 2 * POSITIONS
    gpu = planning.GPU(80, peak * log["fraction_of_matmul_rate"])
    plan = planning.plan(trainer.model.config, 1, gpu, tokens, batch, utilization=1.0)
    rounding = 0.5 / log["tokens_per_second"] + 0.0005 / log["fraction_of_matmul_rate"]
    assert plan.steps == 4 and plan.gpu_hours * 3600 == pytest.approx(tokens / log["tokens_per_second"], rel=rounding)


def test_adapters_are_counted_as_peft_makes_them(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert planning.Adapters(4).parameters(model.config) == trained


def test_seven_billion_weights_of_four_bits_fit_24_gb():
    config, gpu = AutoConfig.from_pretrained(RECIPES / "7b"), planning.GPUS["l4"]
    adapters = planning.Adapters(64, four_bit=True)
    plan = planning.plan(config, 1, gpu, 1e8, 2**16, adapters=adapters)
    values = yaml.safe_load((RECIPES.parent / "sft" / "qlora_7b.yaml").read_text(encoding="utf-8"))
    assert plan.layout.checkpointed == values["gradient_checkpointing"] and values["load_in_4bit"] and gpu.memory == 24
    assert plan.layout.sequences >= values["per_device_train_batch_size"] and adapters.rank == values["lora_r"]
    layers, rest = 32 * 12 * 4096**2, 68608 * 4096
    weights = layers * 4.5 / 8 + 2 * rest + 2 * 4 * 4096**2 + 6 * plan.trained  # one matrix is in bfloat16 at a time
    assert plan.memory["weights"] * 2**30 == pytest.approx(weights) and plan.trained == 32 * 64 * 18 * 4096
    assert sum(plan.memory.values()) < 0.9 * 24
    whole = planning.Adapters(64)
    assert planning.memory(config, plan.layout, 1, whole)["weights"] > 12.5  # 2 bytes for each
    assert planning.flops_per_token(config, whole) < 0.75 * planning.flops_per_token(config)
    with pytest.raises(ValueError, match="use more GPUs, or larger ones"):
        planning.plan(config, 1, gpu, 1e8, 2**16)


def test_layouts_that_save_memory_come_last():
    config, gpu = AutoConfig.from_pretrained(RECIPES / "350m"), planning.GPUS["a100"]
    assert not planning.fitting_layout(config, 8, gpu, 2**23).sharded
    small = planning.GPU(7, 100)
    assert planning.fitting_layout(config, 8, small, 2**23).checkpointed
    sizes = [sum(planning.memory(config, planning.Layout(*way, 1), 8).values()) for way in ((0, 0), (1, 0), (1, 1))]
    assert sizes == sorted(sizes, reverse=True)


def test_the_command_prints_a_plan():
    flags = ["plan", "--config", str(RECIPES / "350m"), "--gpus", "256", "--gpu", "a100"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert "372,244,480" in result.output and "256 a100" in result.output and "of 80 GiB" in result.output
    flags = ["plan", "--config", str(RECIPES / "7b"), "--gpus", "1", "--gpu", "l4", "--batch-tokens", "65536"]
    result = CliRunner().invoke(app, [*flags, "--lora-rank", "64", "--four-bit"])
    assert "6,723,469,312 frozen, 150,994,944 of adapters" in result.output and "of 24 GiB" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "1", "--gpu", "l4"], "use more GPUs, or larger ones"),
        (["--gpus", "3"], "a multiple of 4096 tokens for each of 3 GPUs"),
        (["--gpus", "8", "--gpu", "abacus"], "expected a GPU among a100"),
        (["--gpus", "8", "--utilization", "2"], "utilization in (0, 1], got 2"),
        (["--gpus", "8", "--tokens", "5"], "at least one batch"),
        (["--gpus", "8", "--four-bit"], "expected --lora-rank with --four-bit"),
        (["--gpus", "8", "--lora-rank", "0"], "a rank of at least 1 for adapters, got 0"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(flags, message):
    size = "7b" if "l4" in flags else "350m"
    result = CliRunner().invoke(app, ["plan", "--config", str(RECIPES / size), *flags])
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.stderr
