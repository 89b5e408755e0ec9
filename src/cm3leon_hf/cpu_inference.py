"""Lays a loaded model's weights out for decoding on a CPU.

A step of decoding takes as long as reading the weights, provided that all its rows (branches of guidance, candidates,
drafts) share one reading. PyTorch's own product of a few bf16 rows with a matrix takes two to three times as long;
oneDNN's does not, once the matrix lies in the blocks that its kernels read. Weights that torchao has quantised are
read as they are, instead of being widened to bf16 in every step.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .modeling_cm3leon import CM3LeonAttention, CM3LeonForCausalLM, HeadProjection

ROWS = 2  # that oneDNN plans for: a prompt and its branch of guidance


class PackedProjection(nn.Module):
    """Projections behind one another, `(..., in_features)` to `(..., out_features)`, that can only be evaluated."""

    def __init__(self, biases: Sequence[torch.Tensor | None]):
        super().__init__()
        self.bias = None if biases[0] is None else torch.cat(biases)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = self.product(hidden_states)
        return product if self.bias is None else product + self.bias

    def _save_to_state_dict(self, *args) -> None:
        raise ValueError("expected a model as it was loaded to save, got one optimized for the CPU; load it again")


class BlockedProjection(PackedProjection):
    """The weight lies in oneDNN's blocks."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), ROWS)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, None, "none", [], "")


class Int8Projection(PackedProjection):
    """A weight of int8 with a scale for each of its rows."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        self.weight = torch.cat([weight.qdata for weight in weights])
        self.scale = torch.cat([weight.scale.flatten() for weight in weights]).to(weights[0].dtype)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.aten._weight_int8pack_mm(hidden_states.flatten(0, -2), self.weight, self.scale)
        return rows.unflatten(0, hidden_states.shape[:-1])


class Int4Projection(PackedProjection):
    """A weight of int4 with a scale and a zero point for each group along its rows."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        codes, scale, zero = (
            torch.cat([getattr(weight, name) for weight in weights]) for name in ("qdata", "scale", "zero_point")
        )
        self.group = weights[0].block_size[-1]
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        self.scale_and_zero = torch.stack([scale, -zero * scale], dim=-1).transpose(0, 1).contiguous()

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)
        rows = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scale_and_zero)
        return rows.unflatten(0, hidden_states.shape[:-1])


class PackedAttention(CM3LeonAttention):
    """Attention whose queries, keys and values come from one product."""

    def __init__(self, attention: CM3LeonAttention):
        with torch.device("meta"):
            super().__init__(attention.config, attention.layer_idx)
        self.qkv_proj = packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = packed(attention.out_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)


class PackedHead(HeadProjection):
    """A head whose image rows are packed beside the whole matrix, which is the embedding's as well."""

    def __init__(self, head: HeadProjection, images: slice):
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, bias=False)
        self.weight = head.weight
        self.images, self.image_proj = images, BlockedProjection([head.weight[images]], [None])

    def forward(self, hidden_states: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return self.image_proj(hidden_states) if rows == self.images else super().forward(hidden_states, rows)


@torch.no_grad()
def optimize_for_cpu(model: CM3LeonForCausalLM) -> CM3LeonForCausalLM:
    """
    Lays the weights of a model out for decoding on this CPU, in place; what it computes changes by rounding only.

    Works with weights in float32 and bf16, and with those that torchao has quantised to int8 (`Int8WeightOnlyConfig`)
    or int4 (`IntxWeightOnlyConfig(torch.int4, PerGroup(…))`). The layers' weights are replaced, so no memory is added
    but for the head's image rows, and the model can afterwards neither be trained nor saved nor moved.

    Args:
        model ([`CM3LeonForCausalLM`]): A model on the CPU, as loaded.

    Returns:
        The same model, in evaluation mode. It is left as it is where this build of PyTorch has no oneDNN, or oneDNN
        no bf16 on this processor.

    Raises:
        ValueError: if the model is not on the CPU, has adapters, is optimized already, or has weights of another type.
    """
    projections = [(*layer.self_attn.children(), layer.fc1, layer.fc2) for layer in model.model.layers]
    kinds = {type(projection) for of_layer in projections for projection in of_layer}
    if model.device.type != "cpu" or not all(issubclass(kind, nn.Linear) for kind in kinds):
        raise ValueError(
            f"expected a model as loaded, on the CPU, got {', '.join(sorted(kind.__name__ for kind in kinds))} on "
            f"{model.device}; merge adapters first, and optimize once"
        )
    if not _has_kernels(model.dtype):
        return model.eval()
    for layer in model.model.layers:
        layer.self_attn = PackedAttention(layer.self_attn)
        layer.fc1, layer.fc2 = packed(layer.fc1), packed(layer.fc2)
    model.lm_head = PackedHead(model.lm_head, model.config.vocabulary.image_ids)
    return model.eval()


def packed(*projections: nn.Linear) -> PackedProjection:
    """One projection whose output is that of the given ones behind one another."""
    weights, biases = zip(*((projection.weight, projection.bias) for projection in projections))
    if type(weights[0]) is nn.Parameter:
        return BlockedProjection(weights, biases)
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if isinstance(weights[0], Int8Tensor) and weights[0].scale.numel() == len(weights[0]):
        return Int8Projection(weights, biases)
    if isinstance(weights[0], IntxUnpackedToInt8Tensor) and weights[0].target_dtype == torch.int4:
        return Int4Projection(weights, biases)
    raise ValueError(
        f"expected weights in float32, bf16, int8 with a scale a row, or int4, got {type(weights[0]).__name__}; "
        "quantise with Int8WeightOnlyConfig() or IntxWeightOnlyConfig(torch.int4, PerGroup(128))"
    )


def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


__all__ = ["optimize_for_cpu"]
