"""Evaluates what a model writes about pictures: the six columns of Table 2, or any tasks of their kinds.

    python recipes/evaluate/image_to_text.py --config recipes/evaluate/table2.yaml --model MODEL

Each task of the YAML names a data set, by hub name or local folder, the prompt, and the columns. The folder gets the
texts, `results.json`, `results.md` and `model_index.yml`; the last line printed is JSON. A run that was stopped goes on
where it was. Several GPUs: `accelerate launch` in place of `python`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf.evaluation.files import readable_rows
from cm3leon_hf.evaluation.image_to_text import Task
from cm3leon_hf.evaluation.processes import start_processes
from cm3leon_hf.evaluation.results import markdown_table, summary, write_results
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.retrieval.encoder import fingerprint


@dataclass
class ImageToTextArguments:
    model: str = field(metadata={"help": "Model folder or hub name."})
    out: str = field(default="runs/evaluate-text", metadata={"help": "Folder of the run."})
    tasks: list[dict] = field(default_factory=list, metadata={"help": "What is measured (in the YAML)."})
    count: int = field(default=0, metadata={"help": "First rows of each task; all by default."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that cannot be read."})
    batch_size: int = field(default=16, metadata={"help": "Pictures at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})


def load_rows(task: Task, args: ImageToTextArguments) -> Dataset:
    rows = load_dataset(task.dataset, split=task.split)
    rows = rows.select(range(min(args.count or len(rows), len(rows))))
    task.check(rows)
    return readable_rows(rows, task.image, args.skip_broken)


def answer(task: Task, rows: Dataset, run: Run, model, processor) -> None:
    """Writes, or scores options, as far as that is not done."""
    if task.kind == "visdial":
        run.score(task.name, rows[task.image], task.prompts(rows), rows[task.options][:], model, processor)
    else:
        run.describe(task.name, rows[task.image], task.prompts(rows), model, processor, task.generate)


def main(args: ImageToTextArguments) -> None:
    state = start_processes()
    tasks = {task.name: task for task in (Task(**entry) for entry in args.tasks)}
    rows = {name: load_rows(task, args) for name, task in tasks.items()}
    model = AutoModelForCausalLM.from_pretrained(args.model)
    facts = {"model": f"{Path(args.model).name}@{fingerprint(model)}"}
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    run.start(facts, {name: asdict(task) | {"rows": len(rows[name])} for name, task in tasks.items()})
    processor = AutoProcessor.from_pretrained(args.model, device=state.device)
    model.to(state.device)
    for name, task in tasks.items():
        answer(task, rows[name], run, model, processor)
    state.wait_for_everyone()
    if state.is_main_process:
        measured = {}
        for name, task in tasks.items():
            read = run.scored if task.kind == "visdial" else run.described
            measured[name] = task.measure(rows[name], read(name, len(rows[name])), args.resamples, args.seed)
        card = {"model_name": Path(args.model).name, "task_type": "image-to-text"}
        own = {
            name: {"dataset_type": task.dataset, "dataset_name": name, "dataset_split": task.split}
            for name, task in tasks.items()
        }
        facts |= {f"rows of {name}": len(part) for name, part in rows.items()}
        write_results(Path(args.out), measured, facts | {"resamples": args.resamples}, card, own)
        print(markdown_table(measured))
        print(json.dumps(summary(measured)))


if __name__ == "__main__":
    main(*TrlParser(ImageToTextArguments).parse_args_and_config())
