"""What an evaluation found: JSON, a Markdown table, metadata for a model card, and a plot."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from safetensors.numpy import load_file, save_file

from .files import atomic
from .intervals import Measured

RESULTS, TABLE, CARD, REPLICATES = "results.json", "results.md", "model_index.yml", "replicates.safetensors"
REAL = "real"  # the row of the real pictures, which is no result of the model
LOWER_IS_BETTER = {"fd", "fid", "rfid", "perplexity", "text_perplexity", "image_perplexity"}

Measurements = Mapping[str, Mapping[str, Measured]]  # by setting and metric


def entry(measured: Measured) -> dict[str, float]:
    """A value and its bounds at 95 %, as JSON."""
    low, high = measured.interval()
    return {"value": measured.value, "low": low, "high": high}


def summary(measurements: Measurements) -> dict:
    """All values with their bounds, by setting and metric, as JSON."""
    return {name: {metric: entry(one) for metric, one in metrics.items()} for name, metrics in measurements.items()}


def write_results(
    folder: Path, measurements: Measurements, facts: dict, card: dict, own: Mapping[str, dict] | None = None
) -> None:
    """
    Writes `results.json`, `results.md`, `model_index.yml` and the replicates, which a comparison needs.

    Args:
        folder (`Path`): Of the run.
        measurements: [`Measured`] by setting and metric.
        facts (`dict`): The protocol: model, data, networks, counts.
        card (`dict`): `model_name`, and the `task_type`, `dataset_type`, `dataset_name` and `dataset_split` of
            huggingface_hub's `EvalResult`.
        own (`Mapping[str, dict]`, *optional*): What of these a setting has of its own.
    """
    with atomic(folder / REPLICATES) as part:
        flat = {f"{name}/{metric}": one.replicates for name, row in measurements.items() for metric, one in row.items()}
        save_file(flat, part)
    with atomic(folder / RESULTS) as part:
        text = json.dumps({"protocol": facts, "settings": summary(measurements)}, indent=1, ensure_ascii=False)
        part.write_text(text, "utf-8")
    with atomic(folder / TABLE) as part:
        protocol = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items())
        part.write_text(f"{markdown_table(measurements)}\n\n{protocol}\n", "utf-8")
    with atomic(folder / CARD) as part:
        part.write_text(model_index(measurements, own or {}, **card), "utf-8")


def read_results(folder: Path) -> dict[str, dict[str, Measured]]:
    """
    What [`write_results`] wrote.

    Raises:
        ValueError: if there is nothing, or it cannot be read.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / RESULTS).read_text("utf-8"))["settings"]
        replicates = load_file(folder / REPLICATES)
        return {
            name: {metric: Measured(one["value"], replicates[f"{name}/{metric}"]) for metric, one in metrics.items()}
            for name, metrics in settings.items()
        }
    except Exception as error:  # safetensors has an error of its own for damaged files
        raise ValueError(f"expected results in {folder}, could not read them: {error}; evaluate to the end") from error


def markdown_table(measurements: Measurements) -> str:
    """A row for each setting, a column for each metric, bounds at 95 % in brackets."""
    metrics = list(dict.fromkeys(metric for row in measurements.values() for metric in row))
    lines = [f"| setting | {' | '.join(map(heading, metrics))} |", "|---" * (len(metrics) + 1) + "|"]
    for name, row in measurements.items():
        lines.append(f"| {name} | {' | '.join(cell(row[m]) if m in row else '' for m in metrics)} |")
    return "\n".join(lines)


def heading(metric: str) -> str:
    """A metric's name with the direction that is better."""
    return f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def cell(measured: Measured) -> str:
    """A value with its bounds."""
    low, high = measured.interval()
    return f"{measured.value:.4g} [{low:.4g}, {high:.4g}]"


def model_index(measurements: Measurements, own: Mapping[str, dict], model_name: str, **dataset: str) -> str:
    """The `model-index` of a model card, in YAML; see [`write_results`]."""
    found = [
        EvalResult(
            metric_type=metric,
            metric_name=f"{metric} ({name})",
            metric_value=round(one.value, 6),
            metric_args={"setting": name, "interval_95": [round(bound, 6) for bound in one.interval()]},
            **dataset | own.get(name, {}),
        )
        for name, row in measurements.items()
        if name != REAL
        for metric, one in row.items()
    ]
    return f"{ModelCardData(model_name=model_name, eval_results=found).to_yaml()}\n"


__all__ = ["REAL", "heading", "markdown_table", "model_index", "read_results", "summary", "write_results"]
