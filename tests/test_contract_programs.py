"""The decoder as a program of torch.export, over flex attention, and under an engine's own attention."""

import pytest
import torch
from conftest import POSITIONS, small_config, small_model
from torch.export import Dim
from transformers import AttentionInterface, AutoModel, DynamicCache, GenerationConfig, masking_utils
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.integrations import flex_attention
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, small_config().vocab_size, shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_program_takes_any_batch_and_length(dtype):
    model = small_model().to(dtype)
    sizes = {0: Dim("batch", max=16), 1: Dim("length", max=POSITIONS)}
    program = torch.export.export(
        model, (random_ids(2, 9),), {"use_cache": False}, dynamic_shapes=(sizes, None), strict=False
    ).module()
    for shape in ((3, 2), (5, 40), (2, POSITIONS)):
        ids = random_ids(*shape)
        torch.testing.assert_close(
            program(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=2e-2, rtol=2e-2
        )


@torch.no_grad()
def test_transformers_exporter_takes_a_cache_of_any_length():
    model = small_model()

    def step(rows: int, past: int) -> tuple[torch.Tensor, dict]:
        """Ids, and the inputs of the pass that reads the last of them."""
        ids, cache = random_ids(rows, past + 1), DynamicCache(config=model.config)
        model(ids[:, :-1], cache=cache)
        return ids, {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids), "cache": cache}

    exported = DynamoExporter().export(model, step(2, 9)[1], config=DynamoConfig(dynamic=True))
    program = getattr(exported, "program", exported).module()  # transformers 5.18 returns the program itself
    for rows, past in ((3, 20), (5, 2)):
        ids, inputs = step(rows, past)
        torch.testing.assert_close(program(**inputs)["logits"], model(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_program_with_a_static_cache_as_transformers_makes_it():
    model, ids = small_model(), random_ids(2, 20)
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=2, max_cache_len=32)
    step = {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])}
    program = wrapped.export(**step, strict=False).module()
    logits = [program(input_ids=ids[:, place : place + 1], cache_position=torch.tensor([place])) for place in range(20)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@torch.no_grad()
def test_flex_attention_equals_sdpa(kind, monkeypatch):
    """Interpreted, because transformers compiles it, which takes longer than all the rest of these tests."""
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda training: lambda: flex_attention.flex_attention)
    mask_maker = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda _compile, **given: mask_maker(**given))
    plain, flex, ids = small_model(), small_model(), random_ids(2, 12)
    flex.set_attn_implementation("flex_attention")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    documents = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    given = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": documents}}[kind]
    kept = mask.bool() if kind == "padded" else torch.ones_like(mask).bool()
    output, expected = (model(ids, use_cache=False, **given).logits[kept] for model in (flex, plain))
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_engine_brings_its_own_attention():
    """What vLLM's transformers backend asks of a model: its docs name these arguments and this way to build one."""
    seen = []

    def engine(module, query, key, value, attention_mask, attention_instances, **kwargs):
        seen.append((attention_instances[module.layer_idx], kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("engine", engine)
    config = small_config()
    config._attn_implementation = "engine"
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert model._supports_attention_backend and model.config.base_model_tp_plan
    expected = small_model().model
    model.load_state_dict(expected.state_dict(), assign=True)
    ids = random_ids(1, 12)
    arguments = {"position_ids": torch.arange(12)[None], "use_cache": False, "return_dict": False}
    (hidden,) = model(ids, **arguments, attention_instances={0: "first", 1: "second"})
    assert seen == [("first", 8**-0.5), ("second", 8**-0.5)]
    torch.testing.assert_close(hidden, expected(ids).last_hidden_state)
    (embedded,) = model(inputs_embeds=model.embed_tokens(ids), **arguments, attention_instances=dict(enumerate("ab")))
    torch.testing.assert_close(embedded, hidden)
