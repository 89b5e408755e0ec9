"""A model card made from a run: what it was trained on and how, what it reached, and how to use it."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.results import CARD as MODEL_INDEX

BODY = """
# {name}

A [CM3Leon](https://arxiv.org/abs/2309.02591) of {parameters} parameters: it draws pictures from text and describes
pictures in text.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
ids = model.generate(**processor.for_text_to_image(["what to draw"]), generation_mode="image", do_sample=True)
images = processor.post_process_multimodal_output(ids, generation_mode="image")
```

## Training

{facts}
"""


def write_card(folder: str | Path, parameters: int, facts: dict, measured: dict[str, float], **metadata) -> ModelCard:
    """
    Writes a model's `README.md`.

    Args:
        folder (`str` or `Path`): Of the model, which gives it its name.
        parameters (`int`): How many it has.
        facts (`dict`): What the run was told and what came of it, for a table.
        measured (`dict[str, float]`): Figures on held-out rows, for the model index.
        metadata: Of huggingface_hub's `ModelCardData`: at least `license`; `language`, `datasets`.

    Raises:
        ValueError: if there is no licence.
    """
    if not metadata.get("license"):
        raise ValueError("expected a license for the model card, got none; name one, such as apache-2.0")
    name = Path(folder).resolve().name
    source = (metadata.get("datasets") or ["held-out rows"])[0]
    results = [
        EvalResult(
            task_type="any-to-any",
            dataset_type=Path(source).name,
            dataset_name=Path(source).name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in measured.items()
    ]
    defaults = {"library_name": "transformers", "pipeline_tag": "any-to-any", "tags": ["cm3leon", "text-to-image"]}
    data = ModelCardData(**defaults | metadata, model_name=name, eval_results=results or None)
    lines = ["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items())]
    body = BODY.format(name=name, parameters=f"{parameters:,}", facts="\n".join(lines))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    card.save(Path(folder) / "README.md")
    return card


def check_results(folder: str | Path, runs: Sequence[str | Path]) -> None:
    """
    Checks what [`add_results`] needs.

    Raises:
        ValueError: if the model has no card or a run no results.
    """
    wanted = [Path(folder) / "README.md", *(Path(run) / MODEL_INDEX for run in runs)] if runs else []
    if missing := [str(path) for path in wanted if not path.exists()]:
        raise ValueError(f"expected a model's card and whole evaluations, found no {' and no '.join(missing)}")


def add_results(folder: str | Path, run: str | Path) -> ModelCard:
    """
    Adds what an evaluation found to a model's card; what the card has of the same measurement is replaced.

    Args:
        folder (`str` or `Path`): Of the model.
        run (`str` or `Path`): Of the evaluation, as [`~cm3leon_hf.evaluation.results.write_results`] leaves it.
    """
    path = Path(folder) / "README.md"
    card, found = ModelCard.load(path), ModelCard(f"---\n{(Path(run) / MODEL_INDEX).read_text('utf-8')}---\n").data
    new = {_measurement(one) for one in found.eval_results}
    kept = [one for one in card.data.eval_results or [] if _measurement(one) not in new]
    card.data.model_name = card.data.model_name or found.model_name
    card.data.eval_results = [*kept, *found.eval_results]
    card.save(path)
    return card


def _measurement(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


__all__ = ["add_results", "check_results", "write_card"]
