"""A model optimised for the CPU computes what it computed before, whatever the type of its weights."""

import copy

import pytest
import torch
from conftest import IMAGE_SIZE, TEXT_SIZE, small_model
from peft import LoraConfig, get_peft_model
from transformers import TorchAoConfig

from cm3leon_hf import CM3LeonForCausalLM, cpu_inference, optimize_for_cpu
from cm3leon_hf.modeling_cm3leon import CM3LeonAttention

torchao = pytest.importorskip("torchao.quantization")
QUANTISED = {
    "int8": torchao.Int8WeightOnlyConfig(),
    "int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),
}
GUIDED = {"generation_mode": "image", "guidance_scale": 2.0}
IDS = torch.tensor([[1, 300, 301, 2, 610, 611], [1, 302, 303, 2, 612, 613]])


@pytest.fixture
def inputs(processor):
    return processor.for_text_to_image(["a red circle on white", "blue"])


def new_ids(model, inputs, **arguments) -> torch.Tensor:
    return model.generate(**inputs, generation_mode="image", **arguments)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("images_only", [False, True])
def test_logits_stay_as_they_are(model, images_only):
    optimized = optimize_for_cpu(copy.deepcopy(model))
    for ids in (IDS, IDS[:1], IDS.repeat(20, 1)):
        torch.testing.assert_close(
            optimized(ids, image_logits_only=images_only).logits,
            model(ids, image_logits_only=images_only).logits,
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 3.0},
        {"contrastive_k": 3},
        {"guidance_scale": 3.0, "cache_implementation": "static"},
        {"guidance_scale": 2.0, "jacobi_window": 5},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_it_draws_the_same(model, inputs, arguments):
    optimized = optimize_for_cpu(copy.deepcopy(model))
    assert torch.equal(
        new_ids(optimized, inputs, do_sample=False, **arguments), new_ids(model, inputs, do_sample=False, **arguments)
    )


@torch.no_grad()
def test_bf16_is_as_close_to_float32_as_before(model):
    """Both round at the same places, so that neither errs more than half as much again as the other."""
    exact = copy.deepcopy(model).bfloat16().float()(IDS).logits
    plain = copy.deepcopy(model).bfloat16()
    before = (plain(IDS).logits - exact).square().mean().sqrt()
    after = (optimize_for_cpu(plain)(IDS).logits - exact).square().mean().sqrt()
    assert 0 < after < 1.5 * before < 0.1 * exact.std()


@torch.no_grad()
@pytest.mark.parametrize("queries, kept", [(1, None), (1, 4), (3, 4)])
def test_attention_of_few_bf16_queries_is_that_of_sdpa(model, queries, kept, monkeypatch):
    attention = copy.deepcopy(model.model.layers[0].self_attn).bfloat16()
    hidden = torch.randn(2, queries, 32, dtype=torch.bfloat16)
    mask = None if kept is None else torch.arange(queries).expand(2, 1, queries, queries) < kept - 3
    here, _ = attention(hidden, mask)
    monkeypatch.setattr("cm3leon_hf.modeling_cm3leon.better_without_sdpa", lambda *_: False)
    there, _ = attention(hidden, mask)
    torch.testing.assert_close(here, there, rtol=2e-2, atol=2e-2 * there.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("weights", QUANTISED)
def test_quantised_weights_are_read_as_torchao_reads_them(model, tmp_path, weights):
    model = copy.deepcopy(model).bfloat16()
    model.save_pretrained(tmp_path)
    quantised = CM3LeonForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=TorchAoConfig(QUANTISED[weights])
    )
    assert type(quantised.model.layers[0].fc1.weight) is not torch.nn.Parameter
    expected, drawn = quantised(IDS).logits, [quantised.generate(IDS[:, :4], **GUIDED)[:, 4:]]
    error = (optimize_for_cpu(quantised)(IDS).logits - expected).float().square().mean().sqrt()
    assert error < 0.02 * expected.float().std()
    drawn.append(quantised.generate(IDS[:, :4], **GUIDED)[:, 4:])
    assert all(((ids >= TEXT_SIZE) & (ids < TEXT_SIZE + IMAGE_SIZE)).all() for ids in drawn)


def test_what_cannot_be_optimized_is_refused(model):
    with pytest.raises(ValueError, match="optimize once"):
        optimize_for_cpu(optimize_for_cpu(copy.deepcopy(model)))
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["fc1"])).base_model.model
    with pytest.raises(ValueError, match="merge adapters first"):
        optimize_for_cpu(adapted)
    with pytest.raises(ValueError, match="on meta"):
        optimize_for_cpu(copy.deepcopy(model).to("meta"))


def test_an_optimized_model_is_not_saved_without_its_weights(model, tmp_path):
    with pytest.raises(ValueError, match="load it again"):
        optimize_for_cpu(copy.deepcopy(model)).save_pretrained(tmp_path)


def test_it_is_left_alone_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(cpu_inference.torch.backends.mkldnn, "is_available", lambda: False)
    model = optimize_for_cpu(small_model().train())
    assert type(model.model.layers[0].self_attn) is CM3LeonAttention and not model.training
