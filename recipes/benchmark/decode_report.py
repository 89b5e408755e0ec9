"""What decode.py says: a table, a plot, and the ratios that it is about."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch


def figures(results: dict[str, dict]) -> dict:
    """The ratios that the table is about; those whose rows were not measured are left out."""

    def fastest(model: str, strategy: str, weights: str = "bf16", batch: int = 1) -> dict:
        """The fastest such row, compiled or not."""
        first, last = f"{model} {strategy} ", f" {weights} batch {batch}"
        found = [name for name in results if name.startswith(first) and name.endswith(last) and "Jacobi" not in name]
        none = {"ms_per_step": math.nan, "floor_ms": math.nan}
        return min((results[name] for name in found), key=lambda row: row["ms_per_step"], default=none)

    def ms(*row) -> float:
        return fastest(*row)["ms_per_step"]

    cfg = ms("ours", "CFG")
    ratios = {
        "guided_over_floor": cfg / fastest("ours", "CFG")["floor_ms"],
        "speedup_over_stock_cfg": ms("stock", "CFG") / cfg,
        "guidance_cost": cfg / ms("ours", "plain"),
        "batch16_over_batch1": 16 * cfg / ms("ours", "CFG", "bf16", 16),
        "int8_over_bf16": cfg / ms("ours", "CFG", "int8"),
    }
    prefix = "gpu_" if torch.cuda.is_available() else ""
    return {f"{prefix}{name}": round(ratio, 3) for name, ratio in ratios.items() if not math.isnan(ratio)}


def table(results: dict[str, dict]) -> str:
    lines = ["| row | ms a step | floor | over the floor | tokens/s | peak GB |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        ms, floor = result["ms_per_step"], result["floor_ms"]
        numbers = f"{ms:.1f} | {floor:.1f} | {ms / floor:.2f} | {result['tokens_per_second']:.1f}"
        lines.append(f"| {name} | {numbers} | {result['peak_gb']:.2f} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    names, (times, floors) = list(results), zip(*((row["ms_per_step"], row["floor_ms"]) for row in results.values()))
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(names) + 1.5))
    axes.barh(names, times, color=["tab:blue" if name.startswith("ours") else "tab:gray" for name in names])
    axes.plot(floors, names, "|", color="tab:red", label="the weights read once")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
