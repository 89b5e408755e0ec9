"""Measures decoding against stock transformers and against the time it takes to read the weights once.

    python recipes/benchmark/decode.py --out runs/benchmark

Every row of the table is a process of its own, so that its peak memory is its own; all have the same shape, random
weights and the same number of tokens. The last line is JSON. Run it on an otherwise idle machine.
"""

import gc
import json
import math
import multiprocessing
import resource
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    TorchAoConfig,
)
from trl import TrlParser

from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM, default_model, optimize_for_cpu

STRATEGIES = {
    "plain": {},
    "CFG": {"guidance_scale": 3.0},
    "CD-K": {"contrastive_alpha": 0.1, "contrastive_k": 8},
    "image+text": {"image_guidance_scale": 1.5, "guidance_scale": 7.5},
}
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 0.9}


@dataclass
class DecodeArguments:
    out: str = field(default="runs/benchmark", metadata={"help": "Folder for the table and the plot."})
    shape: str = field(default="350M", metadata={"help": "350M or 7B of the paper, or tiny to try the script."})
    grid: int = field(default=8, metadata={"help": "Tokens along one side of the picture that is drawn."})
    prompt: int = field(default=16, metadata={"help": "Tokens of the prompt."})
    repeats: int = field(default=3, metadata={"help": "Runs of each row behind a first one; the fastest counts."})
    only: str = field(
        default="", metadata={"help": "Measure only rows whose name holds this, and no figures of the shipped model."}
    )


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str  # ours, stock or Janus
    strategy: str
    batch: int = 1
    weights: str = "bf16"
    options: tuple = ()

    @property
    def name(self) -> str:
        return " ".join([self.model, self.strategy, *self.options, self.weights, f"batch {self.batch}"])


ROWS = [
    Row("stock", "plain"),
    Row("stock", "CFG"),
    Row("Janus", "CFG"),
    Row("ours", "CFG", options=("as loaded",)),
    *(Row("ours", strategy) for strategy in STRATEGIES),
    *(Row("ours", strategy, options=("compiled",)) for strategy in ("plain", "CFG")),
    Row("ours", "CFG", options=("Jacobi",)),
    *(Row("ours", "CFG", batch) for batch in (4, 16)),
    *(Row("ours", "CFG", batch, options=("compiled",)) for batch in (4, 16)),
    *(Row("ours", strategy, weights=weights) for weights in ("int8", "int4") for strategy in ("plain", "CFG")),
    *(Row("ours", "CFG", batch, "int8") for batch in (4, 16)),
    *(Row("ours", "CFG", weights=weights, options=("compiled",)) for weights in ("int8", "int4")),
]


def our_config(args: DecodeArguments) -> CM3LeonConfig:
    sizes = {
        "350M": {},
        "7B": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
        "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    return CM3LeonConfig(image_grid_size=args.grid, zero_init="none", **sizes[args.shape])


def shared_sizes(config: CM3LeonConfig) -> dict:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {name: getattr(config, name) for name in names}


def opt_config(config: CM3LeonConfig) -> OPTConfig:
    return OPTConfig(
        **shared_sizes(config),
        word_embed_proj_dim=config.hidden_size,
        ffn_dim=config.intermediate_size,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    )


def janus_config(config: CM3LeonConfig) -> JanusConfig:
    """Its gated MLP has three matrices, so it gets two thirds of the width: as many weights."""
    heads, width = config.num_attention_heads, config.hidden_size
    mlp = {"intermediate_size": config.intermediate_size * 2 // 3}
    text = {"model_type": "llama", "num_key_value_heads": heads} | mlp | shared_sizes(config)
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": width}
    vision |= {"num_image_tokens": config.image_grid_size**2}
    vq = {"num_embeddings": config.image_vocab_size, "image_token_embed_dim": width, "projection_dim": width}
    vq |= {"num_patches": config.image_grid_size, "base_channels": 32, "channel_multiplier": [1, 1]}
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq)


def build(row: Row, args: DecodeArguments):
    """The model of a row with random weights, on the accelerator when there is one, else optimized for the CPU."""
    torch.manual_seed(0)
    config, accelerator = our_config(args), torch.accelerator.current_accelerator(check_available=True)
    if row.model == "stock":
        model = OPTForCausalLM(opt_config(config))
    elif row.model == "Janus":
        model = JanusForConditionalGeneration(janus_config(config))
        model.generation_config.generation_kwargs = {"boi_token_id": 2}
        model.generation_config.update(bos_token_id=1, pad_token_id=0)
    else:
        model = CM3LeonForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    if row.weights != "bf16":
        model = quantised(model, row.weights)
    if accelerator:
        return model.to(accelerator)
    return optimize_for_cpu(model) if row.model == "ours" and not {"as loaded", "compiled"} & {*row.options} else model


def quantised(model, weights: str):
    """As a user does it: saved, and loaded with a quantization_config."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()
        return CM3LeonForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization(weights)
        )


def quantization(weights: str) -> TorchAoConfig:
    """int4 has a layout of its own for each kind of device: this one for CPUs is unpacked until it is optimized."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if weights == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if torch.accelerator.is_available():
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(128)))


def prompts(row: Row, config: CM3LeonConfig, length: int) -> torch.LongTensor:
    ids = torch.randint(300, config.text_vocab_size, (row.batch, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = config.vocabulary.eos_id
    if row.strategy == "image+text":  # something to edit
        ids[:, 1] = config.vocabulary.break_id
        ids[:, 2] = config.text_vocab_size
        ids[:, 3] = config.vocabulary.break_id
    ids[:, -1] = config.vocabulary.break_id
    return ids


def runner(row: Row, args: DecodeArguments):
    """A function that draws one batch."""
    config, model = our_config(args), build(row, args)
    ids, tokens = prompts(row, config, args.prompt).to(model.device), config.vocabulary.image_length
    arguments = dict(SAMPLING)
    if row.model == "Janus":
        arguments |= {"generation_mode": "image", "guidance_scale": 3.0, "attention_mask": torch.ones_like(ids)}
    elif row.model == "stock":
        arguments |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
        if row.strategy == "CFG":
            arguments |= {"guidance_scale": 3.0, "negative_prompt_ids": ids[:, [0, 1, -1]]}
    else:
        arguments |= {"generation_mode": "image"} | STRATEGIES[row.strategy]
        if "compiled" in row.options:
            arguments |= {"cache_implementation": "static"}  # generate() itself compiles then, but on a CPU
            if model.device.type == "cpu":
                torch._inductor.config.freezing = True  # packs the weights, as optimize_for_cpu does
                model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        if "Jacobi" in row.options:
            arguments |= {"jacobi_window": 16}
    return lambda: model.generate(ids, **arguments)


def measure(row: Row, args: DecodeArguments) -> dict:
    """Seconds a step, tokens a second and peak memory of one row; for a process of its own."""
    run = runner(row, args)
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    steps, fastest = args.grid**2, min(seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "ms_per_step": 1e3 * fastest / steps,
        "tokens_per_second": row.batch * steps / fastest,
        "first_run_seconds": seconds[0],
        "peak_gb": peak / 1e9,
    }


def read_bandwidth(size: int = 2**30) -> float:
    """Bytes a second that a matrix-vector product in bf16 reads, for a matrix far beyond the caches."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    matrix = torch.ones(size // 2 // 4096, 4096, dtype=torch.bfloat16, device=device)
    vector = torch.ones(4096, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        matrix @ vector
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        best = max(best, size / (time.perf_counter() - start))
    return best


def bytes_per_step(config: CM3LeonConfig) -> int:
    """Bytes of bf16 weights that one step for an image token needs: the layers, and the head's image rows."""
    layers = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    return 2 * (layers + config.image_vocab_size * config.hidden_size)


def shipped_model_figures() -> dict:
    """What needs trained weights: passes that Jacobi decoding saves, and greedy tokens that INT8 leaves as they are."""
    path = default_model()
    processor = AutoProcessor.from_pretrained(path)
    length = processor.vocabulary.image_length
    subjects = ["red apple", "cat face", "rocket", "green heart", "pizza", "soccer ball", "key", "sun"]
    prompts = [f"{subject}, fluent 3d style" for subject in subjects]
    model = CM3LeonForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    int8 = CM3LeonForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization("int8"))
    return {
        "jacobi_pass_ratio": length * len(prompts) / jacobi_passes(model, processor, prompts),
        "int8_agreement": greedy_agreement(model, int8, processor.for_text_to_image(prompts), length),
    }


def jacobi_passes(model, processor, prompts: list[str]) -> int:
    """Forward passes that the pictures of the prompts take together, each drawn by itself."""
    torch.manual_seed(0)
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    for prompt in prompts:
        model.generate(**processor.for_text_to_image(prompt), generation_mode="image", jacobi_window=16, **SAMPLING)
    hook.remove()
    return len(passes)


@torch.no_grad()
def greedy_agreement(model, other, inputs, length: int) -> float:
    """Fraction of the greedy tokens of `model` that `other` finds likeliest, too, behind the same tokens."""
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, do_sample=False)
    mask = (ids != model.config.pad_token_id).long()
    first, second = (m(ids, attention_mask=mask, image_logits_only=True).logits.argmax(-1) for m in (model, other))
    return (first == second)[:, -length - 1 : -1].float().mean().item()


def figures(results: dict[str, dict], floor: float) -> dict:
    """The ratios that the table is about; those whose rows were not measured are left out."""

    def ms(model: str, strategy: str, weights: str = "bf16", batch: int = 1) -> float:
        """Milliseconds a step of the fastest such row, compiled or not."""
        first, last = f"{model} {strategy} ", f" {weights} batch {batch}"
        found = [name for name in results if name.startswith(first) and name.endswith(last) and "Jacobi" not in name]
        return min((results[name]["ms_per_step"] for name in found), default=math.nan)

    cfg = ms("ours", "CFG")
    ratios = {
        "guided_over_floor": cfg / floor,
        "speedup_over_stock_cfg": ms("stock", "CFG") / cfg,
        "guidance_cost": cfg / ms("ours", "plain"),
        "batch16_over_batch1": 16 * cfg / ms("ours", "CFG", batch=16),
        "int8_over_bf16": cfg / ms("ours", "CFG", "int8"),
    }
    prefix = "gpu_" if torch.cuda.is_available() else ""
    return {f"{prefix}{name}": round(ratio, 3) for name, ratio in ratios.items() if not math.isnan(ratio)}


def table(results: dict[str, dict], floor: float) -> str:
    lines = ["| row | ms a step | tokens/s | over the floor | peak GB |", "|---|---|---|---|---|"]
    for name, result in results.items():
        ms = result["ms_per_step"]
        lines.append(
            f"| {name} | {ms:.1f} | {result['tokens_per_second']:.1f} | {ms / floor:.2f} | {result['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict], floor: float, path: Path) -> None:
    names, times = list(results), [result["ms_per_step"] for result in results.values()]
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(names) + 1.5))
    axes.barh(names, times, color=["tab:blue" if name.startswith("ours") else "tab:gray" for name in names])
    axes.axvline(floor, color="tab:red", label="the weights read once")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: DecodeArguments) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, {}
    rows = [row for row in ROWS if args.only in row.name]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        floor = 1e3 * bytes_per_step(our_config(args)) / pool.apply(read_bandwidth)
        for row in tqdm(rows, desc="rows"):
            try:
                results[row.name] = pool.apply(measure, (row, args))
            except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:  # a format this device lacks
                failed[row.name] = str(error).splitlines()[0]
                tqdm.write(f"{row.name}: {failed[row.name]}")
    print(table(results, floor))
    print(f"floor: {floor:.1f} ms a step")
    plot(results, floor, out / "decode.png")
    summary = figures(results, floor) | (shipped_model_figures() if not args.only else {})
    record = {"arguments": asdict(args), "floor_ms": floor, "rows": results, "failed": failed, "figures": summary}
    (out / "decode.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*TrlParser(DecodeArguments).parse_args_and_config())
