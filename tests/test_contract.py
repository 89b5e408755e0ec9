"""What users of transformers do with any model: caches, devices, precisions, adapters, assistants, batches."""

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import POSITIONS, small_config, small_model, small_vqgan_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from cm3leon_hf import CM3LeonConfig, CM3LeonVQGANConfig

IMAGE = {"generation_mode": "image"}


@pytest.fixture
def ids(vocabulary) -> torch.Tensor:
    """Two prompts of text."""
    return torch.randint(vocabulary.image_id + 1, 600, (2, 9), generator=torch.Generator().manual_seed(1))


# the embedding


def test_the_embedding_keeps_its_size(model):
    embedding, size = model.get_input_embeddings(), model.config.vocab_size
    for arguments in ({}, {"new_num_tokens": size}, {"pad_to_multiple_of": 8}):
        assert model.resize_token_embeddings(**arguments) is embedding
    for arguments in ({"new_num_tokens": size + 1}, {"new_num_tokens": 600}, {"pad_to_multiple_of": 64}):
        for part in (model, model.model):
            with pytest.raises(ValueError, match="image ids.*text_vocab_size"):
                part.resize_token_embeddings(**arguments)
    assert model.get_input_embeddings().weight.shape[0] == size


# configurations


@pytest.mark.parametrize("config", [small_config(), small_vqgan_config()], ids=["decoder", "image tokenizer"])
def test_a_configuration_of_a_newer_version_is_reported(tmp_path, caplog, config):
    settings = config.to_dict() | {"model_type": config.model_type, "use_sparks": True, "spark_rate": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING, "cm3leon_hf"):
        AutoConfig.from_pretrained(tmp_path)
    (record,) = caplog.records
    assert type(config).__name__ in record.message
    assert "spark_rate, use_sparks" in record.message and "update" in record.message


def test_what_transformers_adds_to_a_configuration_is_not(model, saved_vqgan, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "cm3leon_hf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16")
        AutoModel.from_pretrained(saved_vqgan, dtype="bfloat16")
        CM3LeonConfig(torch_dtype="float32", quantization_config={}, name_or_path="here", output_attentions=True)
    assert not caplog.records


@pytest.mark.parametrize("name", ["bf16", "relu", "torch.bfloat16"])
@pytest.mark.parametrize("kind", [CM3LeonConfig, CM3LeonVQGANConfig])
def test_a_wrong_dtype_is_named(folder, tmp_path, kind, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.model_type, "dtype": name}))
    for load in (lambda: AutoConfig.from_pretrained(tmp_path), lambda: kind(dtype=name)):
        with pytest.raises(ValueError, match=f"dtype.*{name}"):
            load()
    with pytest.raises(ValueError, match="dtype"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=name)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# precisions and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close_and_draws_whole_images(model, ids, dtype):
    half = copy.deepcopy(model).to(dtype)
    probabilities, expected = (m(ids).logits.float().softmax(-1) for m in (half, model))
    assert (probabilities - expected).abs().max() < 0.05
    drawn = half.generate(ids, **IMAGE, guidance_scale=3.0)[:, -16:]
    assert model.config.vocabulary.is_image(drawn).all()


@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_layers_that_lie_elsewhere_draw_the_same(model, ids, tmp_path, where):
    model.save_pretrained(tmp_path / "model")
    parts = ("lm_head", "model.embed_tokens", "model.embed_positions", "model.final_layer_norm")
    placed = "auto" if where == "cpu" else dict.fromkeys(parts, "cpu") | {"model.layers": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offload"
    )
    assert (loaded.model.layers[0].fc1.weight.device.type == "meta") == (where == "disk")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    drawn, expected = (m.generate(ids, **IMAGE, guidance_scale=3.0) for m in (loaded, model))
    assert torch.equal(drawn, expected)


# adapters


def test_an_adapter_trains_and_comes_back(ids, tmp_path):
    adapted = get_peft_model(small_model(), LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"]))
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name.split(".")[-4] for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    torch.optim.SGD(adapted.parameters(), lr=10.0).step()
    adapted.eval()
    drawn = adapted.generate(ids, **IMAGE)
    assert adapted(input_ids=ids, labels=ids).loss < loss and not torch.equal(
        drawn, small_model().generate(ids, **IMAGE)
    )
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), tmp_path)
    assert torch.equal(loaded.generate(ids, **IMAGE), drawn)
    assert torch.equal(loaded.merge_and_unload().generate(ids, **IMAGE), drawn)


# assistants


@pytest.mark.parametrize("mode", [{"max_new_tokens": 16}, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_decoding_writes_the_same(model, ids, mode, way):
    helper = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {}
    if way == "assistant":
        helper["assistant_model"] = small_model(num_hidden_layers=1)
    prompt = ids[:1].repeat(1, 2)  # so that looking back finds something
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    assisted = model.generate(prompt, **mode, **helper)
    handle.remove()
    assert torch.equal(assisted, model.generate(prompt, **mode))
    assert way == "assistant" or len(passes) <= 16


# continuous batching


def batch(model, prompts: list[list[int]], **arguments) -> list[list[int]]:
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, continuous_batching_config=pages, warmup=False, **arguments)
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("mode", ["text", "image"])
def test_continuous_batching_generates_as_one_by_one(model, ids, mode):
    prompts = [ids[0].tolist(), ids[1, :4].tolist(), ids[0, 2:].tolist()]
    config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=False, generation_mode=mode, max_new_tokens=10)
    expected = []
    for prompt in prompts:
        alone = model.generate(torch.tensor([prompt]), generation_mode=mode, max_new_tokens=10)[0].tolist()
        expected.append(alone[-16:] if mode == "image" else alone[len(prompt) :])
    assert batch(model, prompts, generation_config=config) == expected
    assert len(expected[0]) == (16 if mode == "image" else 10)


@pytest.mark.parametrize(
    "mode, changes, length, remedy",
    [
        ("image", {"guidance_scale": 3.0}, 5, "guidance_scale=1"),
        ("image", {"contrastive_k": 3}, 5, "call generate"),
        ("interleaved", {}, 5, "'text' or 'image'"),
        ("image", {}, POSITIONS - 16, "shorten"),
        ("text", {}, POSITIONS, "shorten"),
    ],
)
def test_continuous_batching_refuses(model, mode, changes, length, remedy):
    config = GenerationConfig(eos_token_id=1, **changes)
    with pytest.raises(ValueError, match=remedy):
        batch(model, [[7] * length], generation_config=config, generation_mode=mode)
    assert model.config._attn_implementation == "sdpa"  # and leaves the model as it was


# tensor parallelism

SHARDED = """
import sys, torch
from transformers import AutoModelForCausalLM
import cm3leon_hf

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
ids = torch.tensor([[1, 300, 301, 302], [1, 400, 401, 402]])
found = {
    "logits": model(ids).logits,
    "image": model.generate(ids, generation_mode="image", guidance_scale=3.0),
    "text": model.generate(ids, max_new_tokens=8),
    "shard": torch.tensor(model.model.layers[0].self_attn.q_proj.weight.to_local().shape),
}
if torch.distributed.get_rank() == 0:
    torch.save(found, out)
"""


@torch.no_grad()
def test_tensor_parallelism_on_two_processes_equals_one(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tmp_path / name) for name in ("sharded.py", "model", "found.pt")]
    result = subprocess.run(
        command + arguments, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")
    ids = torch.tensor([[1, 300, 301, 302], [1, 400, 401, 402]])
    torch.testing.assert_close(found["logits"], model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["image"], model.generate(ids, **IMAGE, guidance_scale=3.0))
    assert torch.equal(found["text"], model.generate(ids, max_new_tokens=8))
    assert found["shard"].tolist() == [16, 32]
