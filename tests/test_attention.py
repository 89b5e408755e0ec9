"""Attention of training on a CPU, in blocks of queries."""

import pytest
import torch
from conftest import small_model
from torch.nn.functional import scaled_dot_product_attention

from cm3leon_hf import modeling_attention, modeling_cm3leon
from cm3leon_hf.modeling_attention import BlockedAttention

BATCH, HEADS, LENGTH, WIDTH = 3, 4, 37, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(modeling_attention, "FEWEST", 8)
    monkeypatch.setattr(modeling_attention, "ELEMENTS", 3 * 8 * LENGTH)  # three heads at a time, the fourth alone


def states(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH, HEADS, WIDTH)  # as projections give them
    return [torch.randn(shape, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]


def packed_mask() -> torch.BoolTensor:
    """Documents that end elsewhere in each sequence."""
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for row, end in enumerate((5, 16, 30)):
        mask[row, :, end:, :end] = False
    return mask


def outputs_and_gradients(attend, given: list[torch.Tensor]) -> list[torch.Tensor]:
    out = attend(*given)
    return [out, *torch.autograd.grad(out, given, torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos())]


@pytest.mark.parametrize("mask", [None, packed_mask()], ids=["causal", "packed"])
def test_blocks_are_sdpa_with_its_gradients(mask):
    given = states(torch.float64)
    found = outputs_and_gradients(lambda *given: BlockedAttention.apply(*given, mask, 0.3), given)
    options = {"is_causal": True} if mask is None else {"attn_mask": mask}
    wanted = outputs_and_gradients(lambda *given: scaled_dot_product_attention(*given, **options, scale=0.3), given)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # keys and values sum in float32


@pytest.mark.parametrize("length", [7, 8, 9, 37])
def test_every_query_is_in_one_block(length):
    for mask in (None, packed_mask()):
        seen = torch.zeros(BATCH * HEADS, length)
        for rows, asking, keys in modeling_attention.blocks(torch.Size((BATCH, HEADS, length, WIDTH)), mask):
            seen[rows, asking] += 1
            assert keys == slice(0, asking.stop)
            assert mask is None or rows.start // HEADS == (rows.stop - 1) // HEADS
        assert (seen == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_training_in_half_precision_takes_blocks_and_is_as_exact_as_with_sdpa(packed, monkeypatch):
    taken, blocked = [], BlockedAttention.apply
    monkeypatch.setattr(BlockedAttention, "apply", lambda *given: taken.append(1) or blocked(*given))
    model = small_model(num_attention_heads=2).train()
    batches = torch.randint(1, 40, (8, 2, 40), generator=torch.Generator().manual_seed(0))  # errors of one vary
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1) if packed else None

    def gradients(half: bool) -> torch.Tensor:
        found = []
        for ids in batches:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
            found += [weight.grad.flatten() for weight in model.parameters()]
        return torch.cat(found)

    in_blocks, exact = gradients(half=True), gradients(half=False)
    assert len(taken) == len(batches) * model.config.num_hidden_layers
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(batches[0], position_ids=positions)
    assert len(taken) == len(batches) * model.config.num_hidden_layers
    monkeypatch.setattr(modeling_cm3leon, "is_faster_in_blocks", lambda *_: False)
    assert (in_blocks - exact).norm() < 1.2 * (gradients(half=True) - exact).norm()
