"""Evaluates an instruction-tuned model on the held-out rows of the emoji tasks.

    python recipes/evaluate/emoji_tasks.py --config recipes/evaluate/emoji_tasks.yaml [--model MODEL] [--adapters A]

Edits are judged by a network that `emoji_judge.py` trains: whether the picture has the style, skin tone, gender or
colour that was asked for, and still shows the same thing, whatever its gender and colour. Boxes are those of what is
drawn, and control pictures are made of it again. Words are right if no other word of the tasks is more like what was
drawn; captions must name concept and style exactly. Of several candidates for an edit CLIP keeps the best, by its
likeness to the instruction, to the given picture and to all candidates; of several captions of the artist's picture it
keeps the one that it and the model agree on. The row `oracle` has the right answers in place of the model's, as far as
codes can show them. The columns `judge_…` are the judge's accuracy on pictures that it never saw: the artists' own ones
in the row `real`, the same coded and decoded in `oracle`.

The folder gets the answers, `results.json`, `results.md` and `sheet.png`, a contact sheet of all tasks; the last line
printed is JSON. A run that was stopped goes on where it was. Several GPUs: `accelerate launch` in place of `python`.
Needs the extras `eval` and `controls`.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import load_dataset
from emoji_judge import ORACLE, EmojiJudge, EmojiJudgeArguments, Shown, accuracies, judge_for
from emoji_measures import CONTROLS, Means, measure
from emoji_sheet import draw_sheet
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_clip, default_model, default_ranker, default_tuned_model
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.instructions import answer_instructions, best_edits, best_texts, is_drawn
from cm3leon_hf.evaluation.intervals import measure_mean
from cm3leon_hf.evaluation.processes import start_processes
from cm3leon_hf.evaluation.results import entry, markdown_table, write_results
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.images import read_image
from cm3leon_hf.retrieval.encoder import fingerprint

MODEL = "model"


@dataclass
class EmojiTasksArguments:
    model: str = field(default="", metadata={"help": "Model folder; the shipped tuned one by default."})
    adapters: str = field(
        default="", metadata={"help": "Folder of adapters on that model, then by default the one shipped untuned."}
    )
    dataset: str = field(default="data/emoji-tasks", metadata={"help": "Folder of the emoji tasks."})
    corpus: str = field(default="data/emoji", metadata={"help": "Folder of the emoji data set."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to evaluate on."})
    out: str = field(default="runs/evaluate-emoji-tasks", metadata={"help": "Folder of the run."})
    judge: str = field(default="runs/emoji-judge", metadata={"help": "Folder of judges; what is missing is trained."})
    judge_training: dict = field(default_factory=dict, metadata={"help": "`decoded` and `training` (in the YAML)."})
    generate: dict = field(default_factory=dict, metadata={"help": "Arguments of `generate` by task (in the YAML)."})
    candidates: dict = field(
        default_factory=dict,
        metadata={"help": "Edits or captions for each row, of which CLIP keeps one, by task (in the YAML)."},
    )
    ranker: str = field(default="", metadata={"help": "CLIP of open_clip that picks them; the shipped one by default."})
    clip: str = field(
        default="", metadata={"help": "CLIP that compares edits with what they begin with; the shipped one by default."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks to evaluate; all by default."})
    retrieved: bool = field(default=True, metadata={"help": "Whether rows stand behind what they retrieved."})
    count: int = field(default=0, metadata={"help": "First rows of each task; all by default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Of all pictures but unedited ones."})
    image_guidance_scale: float | None = field(default=None, metadata={"help": "Of edits."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self):
        self.model = self.model or (default_model() if self.adapters else default_tuned_model())

    def arguments(self, task: str, drawn: bool) -> dict:
        """Arguments of `generate` for a task."""
        found = dict(self.generate.get(task, self.generate.get("draw" if drawn else "write", {})))
        if self.guidance_scale is not None and drawn and task != "no_edit":
            found["guidance_scale"] = self.guidance_scale
        if self.image_guidance_scale is not None and task == "edit":
            found["image_guidance_scale"] = self.image_guidance_scale
        return found


def right_answers(rows: list[dict]) -> list:
    return [row["codes"][row["answer"]] if is_drawn(row) else row["texts"][row["answer"]].strip() for row in rows]


def rows_by_task(args: EmojiTasksArguments) -> dict[str, list[dict]]:
    rows = {}
    for row in load_dataset(args.dataset, split=args.split):
        row["retrieved"] = row.get("retrieved") if args.retrieved else []
        rows.setdefault(row["task"], []).append(row)
    if unknown := sorted(set(args.tasks) - set(rows)):
        raise ValueError(f"expected tasks among {sorted(rows)}, got {unknown}; correct --tasks")
    return {task: rows[task][: args.count or None] for task in args.tasks or sorted(rows)}


def plan(rows: list[dict], arguments: dict, candidates: int) -> dict:
    documents = sum(bool(row["retrieved"]) for row in rows)
    return {"rows": len(rows), "generate": arguments, "documents": documents, "candidates": candidates}


def real_pictures(args: EmojiTasksArguments, rows: dict[str, list[dict]]) -> dict:
    """The artists' pictures by source, as far as they are compared with control pictures or with texts."""
    compared = [task for task, part in rows.items() if args.candidates.get(task, 1) > 1 and not is_drawn(part[0])]
    wanted = {row["source"] for task in (*CONTROLS, *compared) for row in rows.get(task, ())}
    pictures = load_dataset(args.corpus, split=args.split) if wanted else ()
    return {row["source"]: read_image(row["image"]) for row in pictures if row["source"] in wanted}


def written_words(args: EmojiTasksArguments) -> list[str]:
    """All words that rows of any split write."""
    splits = load_dataset(args.dataset).select_columns(["task", "kind", "value"]).values()
    found = (zip(split["task"][:], split["kind"][:], split["value"][:]) for split in splits)
    return sorted({value for rows in found for task, kind, value in rows if (task, kind) == ("write", "word")})


def load_model(args: EmojiTasksArguments):
    if not args.adapters:
        return AutoModelForCausalLM.from_pretrained(args.model)
    from cm3leon_hf.training.adapters import load_adapters

    return load_adapters(args.adapters, args.model).merge_and_unload()


def judge_of(args: EmojiTasksArguments, processor) -> tuple[EmojiJudge, Shown]:
    """The judge, trained if that is not done, and the split's pictures that it is measured on."""
    wanted = {name: getattr(args, name) for name in ("dataset", "corpus", "model", "split")}
    return judge_for(EmojiJudgeArguments(out=args.judge, **wanted, **args.judge_training), processor)


def report(args: EmojiTasksArguments, measured: dict[str, dict], facts: dict) -> None:
    mean = partial(measure_mean, resamples=args.resamples, seed=args.seed)
    measured = {name: {metric: mean(each) for metric, each in row.items()} for name, row in measured.items()}
    dataset = {"dataset_type": "emoji-tasks", "dataset_name": "Emoji tasks", "dataset_split": args.split}
    write_results(
        Path(args.out), measured, facts, {"model_name": Path(args.model).name, "task_type": "any-to-any"} | dataset
    )
    print(markdown_table(measured))
    found = {name: {metric: entry(one) for metric, one in row.items()} for name, row in measured.items()}
    print(json.dumps(found.pop(MODEL) | found))


def main(args: EmojiTasksArguments) -> None:
    state, rows = start_processes(), rows_by_task(args)
    model = load_model(args).eval()
    asked = {task: args.arguments(task, is_drawn(part[0])) for task, part in rows.items()}
    facts = {"model": f"{Path(args.model).name}@{fingerprint(model)}", "adapters": args.adapters, "split": args.split}
    ranker = CLIPScorer(args.ranker or default_ranker(), None) if args.candidates else None
    clip = CLIPScorer(args.clip or default_clip(), None) if args.candidates else None
    facts |= {"ranker": ranker.name, "clip": clip.name} if args.candidates else {}
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    run.start(facts, {task: plan(part, asked[task], args.candidates.get(task, 1)) for task, part in rows.items()})
    processor = AutoProcessor.from_pretrained(args.model, device=state.device)
    model.to(state.device)
    real = real_pictures(args, rows)
    for task, part in rows.items():
        make = partial(answer_instructions, model=model, processor=processor, arguments=asked[task])
        if (count := args.candidates.get(task, 1)) > 1:
            best = partial(best_edits, clip=clip) if is_drawn(part[0]) else best_texts
            make = partial(best, ranker=ranker, candidates=count, **make.keywords)
        run.answer(task, [row | {"picture": real.get(row["source"])} for row in part], make)
    judge, held_out = judge_of(args, processor)  # by all processes, which train it together
    state.wait_for_everyone()
    if state.is_main_process:
        means = Means(judge, processor, real, written_words(args))
        measured = {MODEL: {}, **accuracies(judge, held_out, processor)}
        answers = {task: run.answered(task, len(part)) for task, part in rows.items()}
        draw_sheet(rows, answers, processor).save(Path(args.out) / "sheet.png")
        for task, part in rows.items():
            measured[MODEL] |= measure(task, part, answers[task], means)
            measured[ORACLE] |= measure(task, part, right_answers(part), means)
        report(args, measured, facts | {f"rows of {task}": len(part) for task, part in rows.items()})


if __name__ == "__main__":
    main(*TrlParser(EmojiTasksArguments).parse_args_and_config())
