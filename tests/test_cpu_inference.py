"""A model optimised for the CPU computes what it computed before, whatever the type of its weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE_SIZE, TEXT_SIZE, small_model
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
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
    monkeypatch.setattr("cm3leon_hf.modeling_cm3leon.HAS_AMX", False)  # where SDPA itself is taken for one query
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


@torch.no_grad()
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a processor with AVX-512 VNNI")
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_bytes_err_by_half_a_step_of_each_activation(rows):
    codes, scale = torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(48, 1) + 0.5
    hidden = torch.randn(2, rows, 64)
    hidden[0, 0, 5] = 100.0  # beside which the others are small
    hidden[1, 0] = 0.0
    projection = cpu_inference.SplitProjection([SimpleNamespace(qdata=codes, scale=scale)], [None])
    product, weight = projection(hidden), codes.double() * scale
    half_steps = hidden.abs().amax(-1, keepdim=True) / 32512 / 2
    allowed = 1.01 * half_steps * weight.abs().sum(-1) + 1e-5 * product.abs()  # and float32's own
    assert ((product - hidden.double() @ weight.T).abs() <= allowed).all()


@pytest.fixture
def graphs():
    """How often a forward pass has been compiled so far."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler")
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "calls",
    [
        [{"guidance_scale": 3.0}, {"guidance_scale": 2.0}],
        [{"guidance_scale": 3.0, "num_return_sequences": 2, "do_sample": True, "top_k": 1}],  # eight rows
        [{"output_logits": True, "return_dict_in_generate": True}, {"num_beams": 2}],  # of which beams do not compile
    ],
    ids=["guided", "candidates", "watched"],
)
def test_compiled_steps_draw_the_same(model, inputs, graphs, calls):
    """One graph serves all steps and calls of one size."""
    compiled = optimize_for_cpu(copy.deepcopy(model), compiled=True)
    for given in calls:
        given = {"do_sample": False, "generation_mode": "image"} | given
        drawn = [one.generate(**inputs, **given) for one in (compiled, model)]
        if given.get("output_logits"):
            for logits in zip(*(one.logits for one in drawn)):
                torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            drawn = [one.sequences for one in drawn]
        assert torch.equal(*drawn)
    assert graphs() == 1


@pytest.mark.parametrize("weights", QUANTISED)
def test_compiled_steps_read_quantised_weights(model, tmp_path, graphs, weights):
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    config = {"dtype": torch.bfloat16, "quantization_config": TorchAoConfig(QUANTISED[weights])}
    plain, compiled = (CM3LeonForCausalLM.from_pretrained(tmp_path, **config) for _ in range(2))
    optimize_for_cpu(compiled, compiled=True)
    watched = GUIDED | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, logits = (one.generate(IDS[:, :4], **watched).logits[1] for one in (plain, compiled))  # of the first step
    seen = expected.isfinite()
    assert graphs() == 1 and torch.equal(seen, logits.isfinite())
    assert (logits - expected)[seen].square().mean().sqrt() < 0.02 * expected[seen].std()


def test_a_missing_compiler_is_told_at_once(model, monkeypatch):
    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"got none; install g\+\+"):
        optimize_for_cpu(copy.deepcopy(model), compiled=True)


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
