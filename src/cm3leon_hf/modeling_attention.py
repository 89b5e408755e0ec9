"""Attention of training on a CPU: matrix products over blocks of queries."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

FEWEST = 128  # queries in a block
ELEMENTS = 2**21  # scores that exist at a time; few enough for a cache


class BlockedAttention(torch.autograd.Function):
    """
    Scaled dot-product attention that computes the scores of some queries at a time, and again in the backward pass.

    Products are rounded to the inputs' dtype, as in eager attention, and the gradients of keys and values summed in
    float32. In bfloat16 SDPA's kernel for CPUs takes longer: with its backward pass and without matrix units 1.6 times
    as long at 4096 tokens, twice as long at 330.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling: float) -> torch.Tensor:
        """
        Args:
            query, key, value (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): As SDPA takes them.
            mask (`torch.BoolTensor` of shape `(batch, 1, length, length)`, *optional*): True where a query sees a key,
                which is never behind it; `None` for all that are not.
            scaling (`float`): What products are multiplied by.

        Returns:
            `torch.Tensor` of the query's shape.
        """
        shape, (query, key, value) = query.shape, (in_rows(states) for states in (query * scaling, key, value))
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling, ctx.shape, out = scaling, shape, torch.empty_like(query)
        for rows, asking, seen in blocks(shape, mask):
            shares = attention_shares(query[rows, asking], key[rows, seen], mask, rows, asking, shape[1])
            out[rows, asking] = torch.bmm(shares, value[rows, seen])
        return out.view(shape)

    @staticmethod
    def backward(ctx, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        out_grad, query_grad = in_rows(out_grad), torch.empty_like(query)
        key_grad, value_grad = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        for rows, asking, seen in blocks(ctx.shape, mask):  # bmm, since `@` takes twice as long for a single row
            shares = attention_shares(query[rows, asking], key[rows, seen], mask, rows, asking, ctx.shape[1])
            value_grad[rows, seen] += torch.bmm(shares.mT, out_grad[rows, asking])
            shares_grad = torch.bmm(out_grad[rows, asking], value[rows, seen].mT)
            scores_grad = torch._softmax_backward_data(shares_grad, shares, -1, shares.dtype)
            query_grad[rows, asking] = torch.bmm(scores_grad, key[rows, seen])
            key_grad[rows, seen] += torch.bmm(scores_grad.mT, query[rows, asking])
        grads = (query_grad * ctx.scaling, key_grad.to(key.dtype), value_grad.to(value.dtype))
        return *(grad.view(ctx.shape) for grad in grads), None, None


def in_rows(states: torch.Tensor) -> torch.Tensor:
    """`(batch * heads, length, head_dim)`, each row in one piece, for products would copy it again for each block."""
    return states.flatten(0, 1).contiguous()


def blocks(shape: torch.Size, mask: torch.Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of batch and heads, queries, and the keys up to the last of them; under a mask, rows of one sequence."""
    batch, heads, length, _ = shape
    alike = batch * heads if mask is None else heads  # rows under one mask
    size = max(FEWEST, length // 8)
    together = max(1, min(alike, ELEMENTS // (size * length)))
    for first in range(0, batch * heads, alike):
        last = first + alike
        for row in range(first, last, together):
            for start in range(0, length, size):
                stop = min(start + size, length)
                yield slice(row, min(row + together, last)), slice(start, stop), slice(0, stop)


def attention_shares(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, rows: slice, asking: slice, heads: int
) -> torch.Tensor:
    """`(rows, queries, keys)`: softmax of the scores; queries are scaled."""
    scores, lowest = torch.bmm(query, key.mT), torch.finfo(query.dtype).min
    if mask is None:
        count = query.shape[1]
        scores[..., -count:].masked_fill_(behind(count), lowest)
    else:
        scores.masked_fill_(~mask[rows.start // heads, 0, asking, : asking.stop], lowest)
    return scores.softmax(-1)


@lru_cache(maxsize=4)
def behind(count: int) -> torch.Tensor:
    """`(count, count)`: True where a key stands behind a query."""
    return torch.ones(count, count, dtype=torch.bool).triu(1)


def is_faster_in_blocks(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether this is training on a CPU in half precision, under a causal mask or a boolean one for each sequence."""
    shape = (query.shape[0], 1, query.shape[2], query.shape[2])
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float32
        and query.requires_grad
        and query.shape == key.shape
        and (attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape == shape))
        and not torch.compiler.is_compiling()
    )


def blocked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.BoolTensor | None,
    scaling: float,
    **_,
) -> tuple[torch.Tensor, None]:
    """As an attention function of transformers."""
    return BlockedAttention.apply(query, key, value, attention_mask, scaling).transpose(1, 2), None
