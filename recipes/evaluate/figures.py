"""Draws the paper's curves from what runs left behind: Figures 2, 3, 4 (left) and 11, as PNG.

    python recipes/evaluate/figures.py --config recipes/evaluate/figures.yaml

- `compute.png` (Figure 2): a metric of evaluations against the compute of training, as hours of an A100. The hours are
  the training's FLOPs at the rate that `cm3leon plan` assumes; an entry with `hours` and `value` in place of folders
  shows a model that others measured.
- `perplexity.png` (Figure 3): perplexity of held-out data against updates, from what the Trainer logged. A dashed line
  stands where the learning rate rises again, as when a run is resumed for another epoch.
- `guidance.png` (Figure 4, left): a metric against the weight of classifier-free guidance, a line for each model.
- `throughput.png` (Figure 11): image tokens a second against the batch size, a line for each kind of weights and each
  way to run them, from `recipes/benchmark/decode.py`.

A figure without entries is left out. The last line printed is JSON: the points of each line.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from cm3leon_hf.evaluation.intervals import Measured
from cm3leon_hf.evaluation.plots import plot_lines
from cm3leon_hf.evaluation.results import heading, read_results
from cm3leon_hf.evaluation.runs import read_plan
from cm3leon_hf.planning import GPUS, gpu_hours
from cm3leon_hf.training.checkpoints import last_whole_checkpoint

FEWEST = 2  # points that make a line

Lines = dict[str, list[tuple[float, ...]]]  # points by the name of the line


@dataclass
class FigureArguments:
    out: str = field(default="runs/figures", metadata={"help": "Folder for the pictures."})
    compute: list[dict] = field(default_factory=list, metadata={"help": "Points of Figure 2 (in the YAML)."})
    perplexity: list[dict] = field(default_factory=list, metadata={"help": "Runs of Figure 3 (in the YAML)."})
    guidance: list[dict] = field(default_factory=list, metadata={"help": "Evaluations of Figure 4 (in the YAML)."})
    throughput: list[dict] = field(default_factory=list, metadata={"help": "Benchmarks of Figure 11 (in the YAML)."})


def trainer_state(folder: str) -> TrainerState:
    """
    What the Trainer wrote down in a checkpoint, or in the last whole one of a run.

    Raises:
        ValueError: if there is none.
    """
    path = Path(folder)
    if not (path / TRAINER_STATE_NAME).exists():
        path = Path(last_whole_checkpoint(folder) or path)
    if not (path / TRAINER_STATE_NAME).exists():
        raise ValueError(f"expected a training run in {folder}, found no whole checkpoint; name its output folder")
    return TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))


def measured(evaluation: str, setting: str, metric: str) -> Measured:
    """
    One figure of an evaluation.

    Raises:
        ValueError: if it was not measured.
    """
    results = read_results(Path(evaluation))
    if metric not in results.get(setting, {}):
        there = {name: list(row) for name, row in results.items()}
        raise ValueError(f"expected {metric} of the setting {setting} in {evaluation}, got {there}; name one of them")
    return results[setting][metric]


def compute_lines(entries: list[dict]) -> Lines:
    lines: Lines = {}
    for one in entries:
        if "hours" in one:
            point = (one["hours"], one["value"], one["value"], one["value"])
        else:
            found = measured(one["evaluation"], one["setting"], one["metric"])
            hours = gpu_hours(trainer_state(one["training"]).total_flos, GPUS["a100"])
            point = (hours, found.value, *found.interval())
        lines.setdefault(one["name"], []).append(point)
    return lines


def perplexity_line(history: list[dict]) -> list[tuple[float, float]]:
    """Updates and perplexities; of runs that log a held-out loss alone its exponential."""
    logged = [entry for entry in history if "eval_loss" in entry]
    return [(entry["step"], entry.get("eval_perplexity", math.exp(entry["eval_loss"]))) for entry in logged]


def restarts(history: list[dict]) -> list[int]:
    """Updates at which the learning rate rises after it fell."""
    rates = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    found, falling = [], False
    for (_, before), (step, rate) in zip(rates, rates[1:]):
        if rate > before and falling:
            found.append(step)
        falling = rate < before if rate != before else falling
    return found


def guidance_lines(entries: list[dict]) -> Lines:
    """
    Settings that draw one picture with guidance alone, without documents.

    Raises:
        ValueError: if an evaluation measured none.
    """
    lines: Lines = {}
    for one in entries:
        folder, metric = Path(one["evaluation"]), one["metric"]
        results, plan = read_results(folder), read_plan(folder)["settings"]
        guided = [name for name in plan if is_guided(plan[name]) and metric in results.get(name, {})]
        if not guided:
            raise ValueError(f"expected {metric} of settings with guidance alone in {folder}, got {sorted(results)}")
        for name in guided:
            weight, found = plan[name]["arguments"]["guidance_scale"], results[name][metric]
            lines.setdefault(one["name"], []).append((weight, found.value, *found.interval()))
    return lines


def is_guided(setting: dict) -> bool:
    """Whether a setting of a plan is guidance and nothing else."""
    return "guidance_scale" in setting["arguments"] and setting["strategy"] is None and not setting["documents"]


def throughput_lines(entries: list[dict]) -> Lines:
    """Rows of benchmarks that differ in the batch size alone."""
    lines: Lines = {}
    for one in entries:
        for row, figures in json.loads((Path(one["benchmark"]) / "decode.json").read_text("utf-8"))["rows"].items():
            kind, batch = row.rsplit(" batch ", 1)
            lines.setdefault(f"{one['name']}, {kind}", []).append((int(batch), figures["tokens_per_second"]))
    return {name: points for name, points in lines.items() if len(points) >= FEWEST}


def metrics(entries: Iterable[dict]) -> str:
    """The label of an axis that shows metrics of evaluations."""
    return ", ".join(dict.fromkeys(heading(one["metric"]) for one in entries if "metric" in one))


def main(args: FigureArguments) -> None:
    out, drawn = Path(args.out), {}
    if args.compute:
        drawn["compute"] = compute_lines(args.compute)
        labels = ("equivalent A100 hours", metrics(args.compute))
        plot_lines(drawn["compute"], *labels, out / "compute.png", scales=("log", "log"))
    if args.perplexity:
        logs = {one["name"]: trainer_state(one["training"]).log_history for one in args.perplexity}
        drawn["perplexity"] = {name: perplexity_line(history) for name, history in logs.items()}
        marks = {step for history in logs.values() for step in restarts(history)}
        labels = ("updates", "perplexity of held-out data")
        plot_lines(drawn["perplexity"], *labels, out / "perplexity.png", scales=("linear", "log"), marks=marks)
    if args.guidance:
        drawn["guidance"] = guidance_lines(args.guidance)
        plot_lines(drawn["guidance"], "guidance scale", metrics(args.guidance), out / "guidance.png")
    if args.throughput:
        drawn["throughput"] = throughput_lines(args.throughput)
        labels = ("batch size", "image tokens a second")
        plot_lines(drawn["throughput"], *labels, out / "throughput.png", scales=("log", "log"))
    print(json.dumps(drawn))


if __name__ == "__main__":
    main(*TrlParser(FigureArguments).parse_args_and_config())
