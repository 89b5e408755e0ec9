"""What a training run needs, before it is paid for: parameters, FLOPs, memory, layout, days and GPU-hours."""

from dataclasses import dataclass

import torch

from .configuration_cm3leon import CM3LeonConfig
from .modeling_cm3leon import CM3LeonForCausalLM

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """Memory in GiB, and dense bfloat16 TFLOP/s as its maker states them."""

    memory: float
    tflops: float


GPUS = {
    "a100": GPU(80, 312),
    "a100-40gb": GPU(40, 312),
    "b200": GPU(180, 2250),
    "h100": GPU(80, 989),
    "h200": GPU(141, 989),
    "l4": GPU(24, 121),
    "mi300x": GPU(192, 1307),
}
UTILIZATION = 0.4  # share of a GPU's rate that training reaches
FREE = 0.9  # of a GPU's memory; the rest is for the allocator, the communication and the kernels


@dataclass(frozen=True)
class Layout:
    """How a batch and a model are spread over the GPUs."""

    sharded: bool
    checkpointed: bool
    sequences: int

    def __str__(self) -> str:
        sharding = "FSDP2, weights and optimizer sharded" if self.sharded else "DDP, a whole model on each GPU"
        recomputing = ", activation checkpointing" if self.checkpointed else ""
        return f"{sharding}{recomputing}, {self.sequences} sequences at a time on each GPU"


@dataclass(frozen=True)
class Adapters:
    """
    LoRA on all matrices of the layers, over frozen weights in bfloat16.

    Args:
        rank (`int`): Rank of each adapter.
        four_bit (`bool`): Whether the layers' matrices have 4 bits (QLoRA), by bitsandbytes' NF4.
    """

    rank: int
    four_bit: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(
                f"expected a rank of at least 1 for adapters, got {self.rank}; set it, or train all weights"
            )

    def parameters(self, config: CM3LeonConfig) -> int:
        """Weights of the adapters: `rank` for each row and each column of a matrix."""
        sides = 4 * 2 * config.hidden_size + 2 * (config.hidden_size + config.intermediate_size)
        return config.num_hidden_layers * self.rank * sides

    def base_bytes(self, config: CM3LeonConfig) -> float:
        """
        Bytes of the frozen weights.

        4 bits come with a scale in float32 for each 64 weights, 4.5 bits a weight; `use_bnb_nested_quant` would save
        0.4 of them. One layer's largest matrix is there in bfloat16 while it is used.
        """
        layers = config.num_hidden_layers * layer_parameters(config)
        if not self.four_bit:
            return 2 * count_parameters(config)
        return (
            2 * (count_parameters(config) - layers)
            + 4.5 / 8 * layers
            + 2 * config.hidden_size * config.intermediate_size
        )


@dataclass(frozen=True)
class Plan:
    """
    A run's needs.

    Args:
        parameters (`int`): All weights, once where they are tied.
        trained (`int`): Those that are trained: all, or the adapters'.
        flops_per_token (`float`): Forward and backward, without what activation checkpointing computes again.
        memory (`dict[str, float]`): GiB on each GPU, by part.
        kv_cache (`float`): GiB of keys and values of one sequence of full length, when the model generates.
        layout ([`Layout`]): What fits.
        accumulation (`int`): Batches of the layout that make one step.
        steps (`int`): Optimizer steps.
        days, gpu_hours (`float`): At the assumed share of the GPU's rate.
    """

    parameters: int
    trained: int
    flops_per_token: float
    memory: dict[str, float]
    kv_cache: float
    layout: Layout
    accumulation: int
    steps: int
    days: float
    gpu_hours: float


def count_parameters(config: CM3LeonConfig) -> int:
    with torch.device("meta"):
        return CM3LeonForCausalLM(config).num_parameters()


def layer_parameters(config: CM3LeonConfig) -> int:
    return config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)


def flops_per_token(config: CM3LeonConfig, adapters: Adapters | None = None) -> float:
    """
    `6 (W + V d) + 6 L d S`: six operations for each weight of layers and head, and the causal half of the attention.

    Frozen weights cost four, for they have no gradient.
    """
    weights = config.num_hidden_layers * layer_parameters(config) + config.vocab_size * config.hidden_size
    weights = weights if adapters is None else 4 / 6 * weights + adapters.parameters(config)
    return 6 * weights + 6 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings


def activation_bytes(config: CM3LeonConfig, checkpointed: bool, adapters: Adapters | None = None) -> float:
    """
    Bytes that a token's forward pass keeps in the layers for the backward pass, under bfloat16 autocast.

    A layer keeps two inputs of its norms in float32 (8 d), the norms' outputs (4 d), query, key, value and the
    attention's output (8 d), and what the MLP's activation writes (2 f), and reads if it is not ReLU; with
    checkpointing the residual stream alone (4 d), and one layer is computed at a time. Adapters keep the inputs that
    the matrices would, and with dropout each its own, and which were dropped (15 d + 3 f).
    """
    width, inner = config.hidden_size, config.intermediate_size
    layer = 20 * width + (2 if config.hidden_act == "relu" else 4) * inner
    if adapters is not None:
        layer += 15 * width + 3 * inner
    if checkpointed:
        return config.num_hidden_layers * 4 * width + layer
    return config.num_hidden_layers * layer


def memory(config: CM3LeonConfig, layout: Layout, gpus: int, adapters: Adapters | None = None) -> dict[str, float]:
    """
    GiB on each GPU by part, for float32 weights with bfloat16 autocast and AdamW.

    With adapters the weights are those of the frozen base, and the adapters with their bfloat16 copies. Logits are
    counted with what the loss and its gradient keep of them: 2 + 4 + 4 + 4 bytes for each id.
    """
    tokens = layout.sequences * config.max_position_embeddings
    kept = {
        "activations": tokens * activation_bytes(config, layout.checkpointed, adapters),
        "logits": tokens * config.vocab_size * 14,
    }
    weights = full_bytes(config, layout, gpus) if adapters is None else adapted_bytes(config, adapters)
    return {name: size / GIB for name, size in (weights | kept).items()}


def adapted_bytes(config: CM3LeonConfig, adapters: Adapters) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's moments of a run that trains adapters."""
    trained = adapters.parameters(config)
    return {
        "weights": adapters.base_bytes(config) + 6 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }


def full_bytes(config: CM3LeonConfig, layout: Layout, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's moments of a run that trains all weights."""
    parameters = count_parameters(config)
    shards = gpus if layout.sharded else 1
    gathered = 2 * (config.vocab_size * config.hidden_size + 2 * layer_parameters(config)) if layout.sharded else 0
    return {
        "weights": 4 * parameters / shards + (gathered if layout.sharded else 2 * parameters),
        "gradients": 4 * parameters / shards + gathered,
        "optimizer": 8 * parameters / shards,
    }


def fitting_layout(
    config: CM3LeonConfig, gpus: int, gpu: GPU, batch_tokens: int, adapters: Adapters | None = None
) -> Layout:
    """
    The first layout that fits, of those that communicate and recompute less before others, with the largest batch.

    Adapters are never sharded.

    Raises:
        ValueError: if none fits, or the batch cannot be shared among the GPUs.
    """
    share, rest = divmod(batch_tokens, config.max_position_embeddings * gpus)
    if rest or not share:
        raise ValueError(
            f"expected batch_tokens to be a multiple of {config.max_position_embeddings} tokens for each of {gpus} "
            f"GPUs, got {batch_tokens}; change one of them"
        )
    alone = gpus == 1 or adapters is not None
    for sharded, checkpointed in ((False, False), (not alone, False), (not alone, True)):
        for sequences in (number for number in (32, 16, 8, 4, 2, 1) if share % number == 0):
            layout = Layout(sharded, checkpointed, sequences)
            if sum(memory(config, layout, gpus, adapters).values()) <= FREE * gpu.memory:
                return layout
    needed = sum(memory(config, Layout(not alone, True, 1), gpus, adapters).values())
    raise ValueError(
        f"expected {needed:.0f} GiB free on each GPU, got {FREE * gpu.memory:.0f}; use more GPUs, or larger ones"
    )


def gpu_hours(flops: float, gpu: GPU, utilization: float = UTILIZATION) -> float:
    """Hours of one GPU that training with so many FLOPs takes."""
    return flops / (gpu.tflops * 1e12 * utilization) / 3600


def plan(
    config: CM3LeonConfig,
    gpus: int,
    gpu: GPU,
    tokens: float,
    batch_tokens: int,
    utilization: float = UTILIZATION,
    adapters: Adapters | None = None,
) -> Plan:
    """
    Plans a run: `days = tokens x flops_per_token / (gpus x TFLOP/s x utilization)`.

    Args:
        config ([`CM3LeonConfig`]): The model.
        gpus (`int`): Number of GPUs.
        gpu ([`GPU`]): Their kind.
        tokens (`float`): Tokens to train on.
        batch_tokens (`int`): Tokens of one optimizer step.
        utilization (`float`): Share of the GPU's rate that training reaches, in (0, 1].
        adapters ([`Adapters`], *optional*): What is trained in place of all weights.

    Raises:
        ValueError: if nothing fits, or an argument is out of range.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"expected a utilization in (0, 1], got {utilization}")
    if tokens < batch_tokens:
        raise ValueError(f"expected tokens for at least one batch of {batch_tokens}, got {tokens:.0f}; raise tokens")
    layout = fitting_layout(config, gpus, gpu, batch_tokens, adapters)
    flops = flops_per_token(config, adapters)
    hours = gpu_hours(tokens * flops, gpu, utilization)
    return Plan(
        parameters=count_parameters(config),
        trained=adapters.parameters(config) if adapters else count_parameters(config),
        flops_per_token=flops,
        memory=memory(config, layout, gpus, adapters),
        kv_cache=4 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings / GIB,
        layout=layout,
        accumulation=batch_tokens // (layout.sequences * gpus * config.max_position_embeddings),
        steps=round(tokens / batch_tokens),
        days=hours / gpus / 24,
        gpu_hours=hours,
    )


def describe(plan: Plan, tokens: float, gpus: int, gpu: str) -> str:
    """The plan as lines to print."""
    adapted = "" if plan.trained == plan.parameters else f" frozen, {plan.trained:,} of adapters"
    parts = ", ".join(f"{name} {size:.1f}" for name, size in plan.memory.items())
    lines = {
        "parameters": f"{plan.parameters:,}" + adapted,
        "compute": f"{plan.flops_per_token:.3g} FLOPs a token, {plan.flops_per_token * tokens:.3g} in all",
        "layout": str(plan.layout),
        "memory on a GPU": f"{sum(plan.memory.values()):.1f} of {GPUS[gpu].memory:g} GiB: {parts}",
        "keys and values": f"{plan.kv_cache:.2f} GiB for a sequence that is generated",
        "steps": f"{plan.steps:,}, each of {plan.accumulation} batches",
        "time": f"{plan.days:.1f} days on {gpus} {gpu}, {plan.gpu_hours:,.0f} GPU-hours",
    }
    return "\n".join(f"{name:<16} {value}" for name, value in lines.items())
