"""Lays a loaded model's weights out for decoding on a CPU.

A step of decoding takes as long as reading the weights, provided that all its rows (branches of guidance, candidates,
drafts) share one reading. PyTorch's own product of a few bf16 rows with a matrix takes two to four times as long;
oneDNN's takes less, once the matrix lies in the blocks that its kernels read, and inductor's, compiled for the number
of rows, hardly longer than the reading. Weights that torchao has quantised are read as they are, instead of being
widened to bf16 in every step.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers import CompileConfig, StaticCache

from .modeling_cm3leon import CM3LeonAttention, CM3LeonForCausalLM, HeadProjection

ROWS = 4  # that oneDNN multiplies in less time than one or two
FEW = 4  # rows up to which inductor's own products take less time than oneDNN's
WIDEN = 8  # rows from which it pays to widen int8 weights to bf16 in every step


class CompiledCall:
    """A model's forward pass, compiled by inductor, which lays the weights out that it finds in the model."""

    def __init__(self, model: CM3LeonForCausalLM):
        unchecked = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}  # for they are frozen
        self.call = torch.compile(model.__call__, dynamic=False, options=unchecked)
        self.kind = type(model.model.layers[0].fc1)

    def __call__(self, *, input_ids: torch.LongTensor, cache: StaticCache, **inputs):
        for layer in cache.layers:  # whose tensors, marked as fixed for a GPU, would be frozen like weights
            for value in vars(layer).values():
                if isinstance(value, torch.Tensor):
                    value._dynamo_static_input_type = None
        with torch._inductor.config.patch(
            freezing=True,
            max_autotune_gemm=True,
            max_autotune_gemm_backends=self._products(input_ids.numel()),
            max_autotune_report_choices_stats=False,
            autotune_num_choices_displayed=0,
            size_asserts=False,  # of all weights, at every step
        ):
            return self.call(input_ids=input_ids, cache=cache, **inputs)

    def _products(self, rows: int) -> str:
        if self.kind is Int4Projection:
            return "CPP,ATEN"  # the faster one, as measured: inductor has its own for some sizes only
        return "CPP" if rows <= FEW or self.kind is SplitProjection else "ATEN"


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
        rows = hidden_states.flatten(0, -2)
        padded = pad(rows, (0, 0, 0, max(0, ROWS - len(rows))))
        product = torch.ops.mkldnn._linear_pointwise(padded, self.weight, None, "none", [], "")
        return product[: len(rows)].unflatten(0, hidden_states.shape[:-1])


class DenseProjection(PackedProjection):
    """The weight lies as it was, for a compiler to lay out."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        self.weight = torch.cat(weights)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states, self.weight)


class Int8Projection(PackedProjection):
    """A weight of int8 with a scale for each of its rows."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        self.weight = torch.cat([weight.qdata for weight in weights])
        self.scale = torch.cat([weight.scale.flatten() for weight in weights]).to(weights[0].dtype)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)
        if len(rows) > WIDEN:
            return linear(hidden_states, self.weight.to(rows.dtype)) * self.scale
        rows = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        return rows.unflatten(0, hidden_states.shape[:-1])


class SplitProjection(PackedProjection):
    """
    A weight of int8 with a scale for each of its rows, for the integer products of processors with AVX-512 VNNI.

    An activation becomes an integer of 16 bits, in steps of 1 / 32512 of the largest of its row, whose two bytes are
    multiplied as rows of their own. That errs less than rounding activations to bf16 does.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        super().__init__(biases)
        codes = torch.cat([weight.qdata for weight in weights])
        self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        self.scale = torch.cat([weight.scale.flatten() for weight in weights]).float()
        self.zero = torch.zeros(len(codes), dtype=torch.long)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2).float()
        step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 32512
        integers = (rows / step).round()
        high = ((integers + 128) / 256).floor()
        both = (torch.cat([high, integers - 256 * high]) + 128).to(torch.uint8)
        of_bytes = torch.ops.onednn.qlinear_pointwise(
            both, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        high, low = of_bytes.chunk(2)
        return ((256 * high + low) * step).to(hidden_states.dtype).unflatten(0, hidden_states.shape[:-1])


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

    def __init__(self, attention: CM3LeonAttention, compiled: bool):
        with torch.device("meta"):
            super().__init__(attention.config, attention.layer_idx)
        self.qkv_proj = packed(compiled, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = packed(compiled, attention.out_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)


class PackedHead(HeadProjection):
    """
    A head whose image rows are packed beside the whole matrix, which is the embedding's as well.

    They are a copy for inductor's sake, too, which takes a frozen part of a matrix for its first rows.
    """

    def __init__(self, head: HeadProjection, images: slice, compiled: bool):
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, bias=False)
        self.weight = head.weight
        plain = DenseProjection if compiled else BlockedProjection
        self.images, self.image_proj = images, plain([head.weight[images]], [None])

    def forward(self, hidden_states: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return self.image_proj(hidden_states) if rows == self.images else super().forward(hidden_states, rows)


@torch.no_grad()
def optimize_for_cpu(model: CM3LeonForCausalLM, compiled: bool = False) -> CM3LeonForCausalLM:
    """
    Lays the weights of a model out for decoding on this CPU, in place; what it computes changes by rounding only.

    Works with weights in float32 and bf16, and with those that torchao has quantised to int8 (`Int8WeightOnlyConfig`)
    or int4 (`IntxWeightOnlyConfig(torch.int4, PerGroup(…))`). The layers' weights are replaced, so no memory is added
    but for the head's image rows, and the model can afterwards neither be trained nor saved nor moved.

    Args:
        model ([`CM3LeonForCausalLM`]): A model on the CPU, as loaded.
        compiled (`bool`): Whether `generate` compiles its steps. They are faster still, but a call with a new number of
            sequences, or a longer prompt and output than any before, takes up to a minute more and as much memory as
            the weights. It makes a static cache the default, which `max_cache_len` can size for all calls.

    Returns:
        The same model, in evaluation mode. Unless it is to be compiled, it is left as it is where this build of PyTorch
        has no oneDNN, or oneDNN no bf16 on this processor.

    Raises:
        ValueError: if the model is not on the CPU, has adapters, is optimized already, has weights of another type, or
            is to be compiled without a C++ compiler.
    """
    projections = [(*layer.self_attn.children(), layer.fc1, layer.fc2) for layer in model.model.layers]
    kinds = {type(projection) for of_layer in projections for projection in of_layer}
    if model.device.type != "cpu" or not all(issubclass(kind, nn.Linear) for kind in kinds):
        raise ValueError(
            f"expected a model as loaded, on the CPU, got {', '.join(sorted(kind.__name__ for kind in kinds))} on "
            f"{model.device}; merge adapters first, and optimize once"
        )
    if compiled:
        _check_compiler()
    elif not _has_kernels(model.dtype):
        return model.eval()
    for layer in model.model.layers:
        layer.self_attn = PackedAttention(layer.self_attn, compiled)
        layer.fc1, layer.fc2 = packed(compiled, layer.fc1), packed(compiled, layer.fc2)
    model.lm_head = PackedHead(model.lm_head, model.config.vocabulary.image_ids, compiled)
    if compiled:
        _compile_steps(model)
    return model.eval()


def _compile_steps(model: CM3LeonForCausalLM) -> None:
    """Makes `generate` take compiled steps, as it does by itself on a GPU."""
    warnings.filterwarnings("ignore", "To copy construct", module="torch._inductor.mkldnn_lowerings")  # its own doing
    call, config = CompiledCall(model), CompileConfig()
    config._compile_all_devices = True
    model.generation_config.update(cache_implementation="static", compile_config=config)
    model.get_compiled_call = lambda _: call


def packed(compiled: bool, *projections: nn.Linear) -> PackedProjection:
    """One projection whose output is that of the given ones behind one another."""
    weights, biases = zip(*((projection.weight, projection.bias) for projection in projections))
    if type(weights[0]) is nn.Parameter:
        return (DenseProjection if compiled else BlockedProjection)(weights, biases)
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if isinstance(weights[0], Int8Tensor) and weights[0].scale.numel() == len(weights[0]):
        return (SplitProjection if compiled and torch.cpu._is_vnni_supported() else Int8Projection)(weights, biases)
    if isinstance(weights[0], IntxUnpackedToInt8Tensor) and weights[0].target_dtype == torch.int4:
        return Int4Projection(weights, biases)
    raise ValueError(
        f"expected weights in float32, bf16, int8 with a scale a row, or int4, got {type(weights[0]).__name__}; "
        "quantise with Int8WeightOnlyConfig() or IntxWeightOnlyConfig(torch.int4, PerGroup(128))"
    )


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("expected a C++ compiler, got none; install g++, or leave compiled out") from error


def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


__all__ = ["optimize_for_cpu"]
